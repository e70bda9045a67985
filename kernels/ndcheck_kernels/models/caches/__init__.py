"""What models keep of earlier tokens, where transformers keeps it in another way than columns."""
