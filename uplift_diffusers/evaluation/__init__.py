"""Measurement of upsamplers on photographs."""
