"""The tool of the deliberate faults finds a place whatever its layout and its local names are."""

import pytest

from tests.faults.anchors import Missing, break_source
from tests.faults.run import check, load

CODE = '''
LIMIT = 8  # bytes
SQL = f"""SELECT {LIMIT}
FROM tasks"""

class Ends:
    def at(self, text: str, now: float) -> bool:
        end = self.read(text) + 1
        if end<=now :  # é
            self.close()
        return end > 0
'''


@pytest.mark.parametrize(
    ("name", "replace", "instead", "line"),
    [
        ("Ends.at", "end <= now", "False", "if (False) :"),
        ("Ends.at", "expires <= moment", "moment > expires", "if (now > end) :"),
        ("Ends.at", "self.close()", "pass", "            pass\n"),
        ("LIMIT", "", "9", "LIMIT = 9  #"),
        ("SQL", "FROM tasks", "FROM users", "FROM users"),
        ("", "# bytes", "# bits", "8  # bits"),
    ],
)
def test_a_place_is_found(name: str, replace: str, instead: str, line: str) -> None:
    assert line in break_source(CODE, name, replace, instead)


@pytest.mark.parametrize(
    ("name", "replace"),
    [("Ends.gone", "1"), ("Ends.at", "self.open()"), ("Ends.at", "self"), ("SQL", "FROM")],
)
def test_a_place_that_is_gone_is_reported(name: str, replace: str) -> None:
    with pytest.raises(Missing):
        break_source(CODE.replace("FROM tasks", "FROM FROM"), name, replace, "False")


def test_the_place_of_every_fault_is_there() -> None:
    assert check(load()) == []
