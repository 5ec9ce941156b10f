"""The demo: `uplift-diffusers demo` opens a page that enlarges, creates and compares pictures."""
