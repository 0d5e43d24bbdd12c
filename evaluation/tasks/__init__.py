"""The protocol's tasks, in the harness's own format, and the functions that they name. Read by `evaluation.tasks.build`."""
