"""The parts of :mod:`entprop_wrap.integrations.hub_datasets`: from where images come to what a model takes."""
