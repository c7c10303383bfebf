"""Wrong and odd command lines: one line and exit code 2, or exit code 0 and a right result.

Never a traceback. The working folder holds `good` and `bad`, and `new`, where results go.
"""

import collections
import shlex
import shutil
import traceback
import warnings

import pytest

import test_rules
import wrong_inputs_of_images
import wrong_inputs_of_models
from hostile_files import COMMANDS, call, files_of, make_bad, make_good
from odd_inputs import ODD_INPUTS

WRONG_INPUTS = wrong_inputs_of_models.WRONG_INPUTS | wrong_inputs_of_images.WRONG_INPUTS
ODD_ROWS = [(command, *row) for command, rows in ODD_INPUTS.items() for row in rows]
FEWEST_OF_A_SCRIPT = 6
MOST_OF_A_KIND = 6
# They make the folder of their output, to see that they can write there, before all is checked.
MAKES_ITS_FOLDER = ("evaluate", "reference")
# Those that Python itself does not print. pytest catches the others, which a user would see.
HIDDEN_WARNINGS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile lines")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_good(folder)
        make_bad(folder)
    return folder


def test_the_tables_are_wide():
    assert WRONG_INPUTS.keys() == COMMANDS.keys() and ODD_INPUTS.keys() <= COMMANDS.keys()
    entries = {script for script, _ in COMMANDS.values() if not script.startswith("scripts/")}
    assert entries == test_rules.SCRIPTS.keys()
    for command, (script, _) in COMMANDS.items():
        rows = [*WRONG_INPUTS[command], *ODD_INPUTS.get(command, [])]
        kinds = collections.Counter(what for what, _, _ in rows)
        assert max(kinds.values()) <= MOST_OF_A_KIND, (command, kinds)
        assert len(rows) >= FEWEST_OF_A_SCRIPT or script.startswith("scripts/"), command
        for _, flags, words in WRONG_INPUTS[command]:   # a path says nothing of what is wrong
            assert words not in flags or words.startswith("--"), (command, flags)


def why_it_is_no_refusal(folder, command, flags, words, capsys) -> str:
    """Runs a command with wrong flags; returns what is wrong with its refusal, or nothing."""
    shutil.rmtree(folder / "new", ignore_errors=True)
    if command in MAKES_ITS_FOLDER:
        (folder / "new").mkdir()
    before = files_of(folder)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for kind in HIDDEN_WARNINGS:
            warnings.simplefilter("ignore", kind)
        try:
            code = call(command, *shlex.split(flags))
        except Exception:
            return traceback.format_exc()
        finally:
            printed = capsys.readouterr()
    if warned:
        return f"expected no warning, got {[str(warning.message) for warning in warned]}"
    if code != 2:
        return f"expected exit code 2, got {code}\n{printed.err}"
    is_quiet = not printed.out or command == "train"            # it says what it takes unchecked
    if len(printed.err.splitlines()) != 1 or not is_quiet:
        return f"expected one line, got\n{printed.out}{printed.err}"
    if words not in printed.err:
        return f"expected the words {words!r}, got\n{printed.err}"
    after = files_of(folder)
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    return f"expected no file to change, found changed: {changed}" if changed else ""


def test_a_wrong_input_is_one_line_and_exit_code_2_and_changes_nothing(folder, monkeypatch, capsys):
    """Runs all rows in one test, so that one process alone makes their files."""
    monkeypatch.chdir(folder)
    failures = []
    for command, rows in WRONG_INPUTS.items():
        for _, flags, words in rows:
            reason = why_it_is_no_refusal(folder, command, flags, words, capsys)
            if reason:
                failures.append(f"{command}: {flags}\n{reason}")
    assert not failures, f"{len(failures)} rows\n\n" + "\n\n".join(failures)


@pytest.mark.long
@pytest.mark.parametrize("command, what, flags, check", ODD_ROWS)
def test_an_odd_input_is_done_as_it_says(folder, monkeypatch, capsys, command, what, flags, check):
    monkeypatch.chdir(folder)
    shutil.rmtree(folder / "new", ignore_errors=True)
    code = call(command, *shlex.split(flags))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "Traceback" not in printed.err + printed.out
    check()
