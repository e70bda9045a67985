"""What carries a state from token to token: short convolutions and the gated delta rule."""
