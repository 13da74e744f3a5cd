__version__ = "0.1.0"

from .basics.threads import choose_waiting

OTHERS = choose_waiting()  # before any module loads torch, which reads the choice then and never again
