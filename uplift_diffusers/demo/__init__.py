"""The demo: `uplift-diffusers demo` serves a page that upscales, generates and compares images."""
