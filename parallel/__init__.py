"""How a model is spread over processes; applied from outside, see `plan.py`."""
