"""Known bugs of reimplementations, made on purpose beside the correct code, to see what each of them costs.

The broken variants live here only: the library has no switches for them. A variant is passed in where the library takes
parts (a decoder, a criterion's numbers), or becomes a method of a copy of the model; nothing in the library is patched.

    bench = Bench(model, streets, rooms)
    trial = find("offsets divided by (H, W)").try_on(bench)
"""

from m2f_lab.explore.traps.attention import ATTENTION
from m2f_lab.explore.traps.backbone import BACKBONE
from m2f_lab.explore.traps.data import DATA
from m2f_lab.explore.traps.loss import LOSS
from m2f_lab.explore.traps.results import RESULTS
from m2f_lab.explore.traps.trap import Bench, Finding, Trap, Trial

MODEL = (*BACKBONE, *ATTENTION)
TRAPS = (*MODEL, *DATA, *LOSS, *RESULTS)

__all__ = ["DATA", "LOSS", "MODEL", "RESULTS", "TRAPS", "Bench", "Finding", "Trap", "Trial", "find"]


def find(name: str) -> Trap:
    """The trap of this name.

    Raises:
        KeyError: there is none; the message lists all names.
    """
    traps = {trap.name: trap for trap in TRAPS}
    if name not in traps:
        raise KeyError(f"There is no trap {name!r}; there are {', '.join(traps)}.")
    return traps[name]
