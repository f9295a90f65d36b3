import pytest

from rlhf_pl.utils.errors import describe_error, first_line


@pytest.mark.parametrize(
    ("error", "line", "description"),
    [
        (ValueError("\nIt is short.\nMore follows."), "It is short", "ValueError: It is short."),
        (ValueError("  \n"), "ValueError", "ValueError"),
        (KeyError("name"), "'name'", "KeyError: 'name'"),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str, description: str) -> None:
    assert first_line(error) == line
    assert describe_error(error) == description
