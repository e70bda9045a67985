"""What a model's files say, checked before anything is built or read from them."""
