"""Model families: one decoder, one small file a family."""
