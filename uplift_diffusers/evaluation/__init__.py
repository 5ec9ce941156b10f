"""
Measurement of upscalers.

`super_resolution` and `text_to_image` say what is enlarged, `methods` what enlarges (`selection` finds them by name or
path), `metrics` what is measured on one output, `cost` what an output costs. `evaluate` brings them together and keeps
each measurement in a file (`records`, named by `digests`); `results` computes the figures from these (`statistics`);
`report` and `plots` write them down. `command` and `cli` are the command line.
"""
