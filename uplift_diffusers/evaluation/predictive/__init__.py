"""The predictive half of the evaluation: upsamplers of a vision transformer's features, measured by linear probes."""
