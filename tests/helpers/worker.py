"""What a process that runs tests begins with: imported first, and settled once everything else is imported."""

import atexit
import gc
import sys

gc.disable()  # until then: collecting garbage would take a fifth of the time of importing


def settle():
    """Use one thread, keep what is imported out of garbage collections, and have dynamo not time its guards."""
    import torch  # not at the top: the process that only hands out tests would import it, before it starts the others

    torch.set_num_threads(1)
    gc.freeze()  # Accelerate collects garbage after every run, and would walk through it all
    atexit.register(gc.unfreeze)  # bindings warn of what is alive after the interpreter's own collection
    gc.enable()
    if guards := sys.modules.get("torch._dynamo.guards"):
        guards.profile_guard_manager = lambda *_: 0.0  # for a line of a log, it flushes the processor's caches
