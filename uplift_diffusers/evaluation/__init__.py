"""
Measurement of upscalers.

`protocols` say what is enlarged, `methods` what enlarges, `metrics` what is measured on one output, and `cost` what
an output costs. `measure` brings them together, keeps each measurement in a file (`records`) and computes the figures
from these (`statistics`); `report` writes them down. `evaluate` is the command.
"""
