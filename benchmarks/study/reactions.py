"""Chemical reactions as SMILES: well-known ones, written by hand, and those that a package's own tests hold.

The first are ten textbook reactions, each with many substituents. They are chemically plain and not drawn from any
database. A held-out one has a substituent that no training reaction has.
"""

import itertools
import re
from pathlib import Path

ALKYLS = ("C", "CC", "CCC", "CC(C)", "CCCC", "CC(C)C", "CCCCC", "CCCCCC", "COCC", "c1ccccc1C", "C1CCCCC1", "C1CCCC1C")
"""Groups that are written in front of what they are bound to."""
ARYLS = (
    *("c1ccccc1", "c1ccc(C)cc1", "c1ccc(OC)cc1", "c1ccc(F)cc1", "c1ccc(Cl)cc1", "c1ccncc1", "c1ccc(C#N)cc1"),
    *("c1ccc2ccccc2c1", "c1cccc(C)c1", "c1ccc(C(F)(F)F)cc1"),
)
"""Rings that are written behind what they are bound to."""
HELD_OUT = ("CC(C)C", "COCC", "c1ccc(OC)cc1", "c1ccc(C#N)cc1")
"""Substituents of the held-out reactions alone."""
ALKYL_ALKYL = {
    "esterification": "{a}C(=O)O.{b}O>>{a}C(=O)O{c}",
    "ether": "{a}[O-].[Na+].{b}Br>>{a}O{c}",
    "amide": "{a}C(=O)Cl.{b}N>>{a}C(=O)N{c}",
    "alkylation of an amine": "{a}NC.{b}I.O=C([O-])[O-].[K+].[K+]>>{a}N(C){c}",
    "thioether": "{a}S.{b}Br.[Na+].[OH-]>>{a}S{c}",
}
"""Reactions of two alkyl groups: `a` and `b` in front, `c` is `b` behind."""
ALKYL_ARYL = {
    "acylation": "{a}C(=O)Cl.N{x}>>{a}C(=O)N{x}",
    "Williamson ether": "{a}Br.O{x}.O=C([O-])[O-].[K+].[K+]>>{a}O{x}",
    "reductive amination": "{a}N.O=C{x}.[BH4-].[Na+]>>{a}NC{x}",
    "saponification": "{a}OC(=O){x}.[Na+].[OH-]>>O=C(O){x}",
}
"""Reactions of an alkyl group `a` and a ring `x`. The Suzuki coupling of two rings comes on top."""
BEHIND = {
    "CC(C)": "C(C)C",
    "CC(C)C": "CC(C)C",
    "COCC": "CCOC",
    "c1ccccc1C": "Cc1ccccc1",
    "C1CCCCC1": "C1CCCCC1",
    "C1CCCC1C": "CC1CCCC1",
}
"""How a group is written behind what it is bound to, where that differs."""


WRONG = ("AAg", "BrCFC", "*")
"""Parts of the reactions that those tests want to see fail, or that hold placeholders."""


def by_hand() -> tuple[list[str], list[str]]:
    """Return (training, held-out) reactions, in a fixed order, without repetitions."""
    found: dict[str, bool] = {}
    for rule, (a, b) in itertools.product(ALKYL_ALKYL.values(), itertools.product(ALKYLS, ALKYLS)):
        found[rule.format(a=a, b=b, c=BEHIND.get(b, b))] = a in HELD_OUT or b in HELD_OUT
    for rule, (a, x) in itertools.product(ALKYL_ARYL.values(), itertools.product(ALKYLS, ARYLS)):
        found[rule.format(a=a, x=x)] = a in HELD_OUT or x in HELD_OUT
    for x, y in itertools.product(ARYLS, ARYLS):
        found[f"OB(O){x}.Br{y}.[Pd]>>{_bound(y, x)}"] = x in HELD_OUT or y in HELD_OUT
    return [each for each, out in found.items() if not out], [each for each, out in found.items() if out]


def _bound(first: str, second: str) -> str:
    """Join two rings: the first atom of `first` carries `second` in a branch."""
    return f"{first[0]}{first[1]}({'-' + second.replace('1', '4').replace('2', '5')}){first[2:]}"


def published(folder: Path) -> list[str]:
    """Return the reactions that the tests of an installed rxnmapper hold, without those that are wrong on purpose."""
    text = "".join(path.read_text() for path in sorted((folder / "tests").glob("test_*mapper.py")))
    found = dict.fromkeys(re.findall(r'"([^".\s:][^"\s:]*>>[^"\s:]+)"', text))
    return [each for each in found if not any(wrong in each for wrong in WRONG)]
