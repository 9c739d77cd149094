"""The models as plain single-device torch modules."""
