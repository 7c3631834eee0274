"""EasyDeL."""
