"""The demo: `python app.py` opens a page that enlarges, creates and compares pictures."""
