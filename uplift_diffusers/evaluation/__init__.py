"""
Evaluation of upscalers.

`protocols` provides the inputs, `methods` the upscalers, `metrics` the measurements on one output, and `cost` its time
and memory (`meters`). `measure` combines them, stores each measurement in a file (`records`) and computes the figures
from these (`statistics`); `report` writes the report. `evaluate` is the command.
"""
