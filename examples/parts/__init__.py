"""What train.py is made of: data, models, and the report. Nothing in here is specific to entprop_wrap."""
