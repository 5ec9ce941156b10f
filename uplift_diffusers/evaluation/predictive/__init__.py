"""
Evaluation of upsamplers of a vision transformer's features.

`peers` holds the published upsamplers, `upsamplers` wraps UPLiFT in their interface. `datasets` and `depth_targets`
provide photographs with a value for every pixel, `probes` trains linear probes and scores them, `drift` applies one
frozen probe after every step, `scaling` measures time, memory and operations. `tasks` combines them, `tables`
writes the reports, `evaluate` is the command.
"""
