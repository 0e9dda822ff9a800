"""What the command line answers before any command runs."""

import re
import subprocess
import sys
from importlib.resources import files

import pytest

import qlip
from qlip.cli.main import COMMANDS, QLIP
from qlip.cli.options import Group, as_typed


def functions(group: Group = QLIP, called: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """All commands whose options do not come from a recipe."""
    found = []
    for name, command in group.commands.items():
        if isinstance(command, Group):
            found += functions(command, (*called, name))
        elif name not in group.own_options:
            found.append((*called, name))
    return found


@pytest.mark.parametrize("words", [(), ("--help",), ("eval",), ("data", "-h"), ("llava",)])
def test_a_group_alone_lists_its_commands(run, words):
    code, out, _ = run(*words)
    group = COMMANDS[words[0]] if words and words[0] in COMMANDS else QLIP
    assert code == 0 and all(f"\n  {name} " in out for name in group.commands)


def test_the_version(run):
    assert run("--version")[:2] == (0, f"qlip {qlip.__version__}\n")


@pytest.mark.parametrize(
    ("words", "message", "expected"),
    [
        (("tokenise", "a.png"), "qlip: no command 'tokenise': did you mean 'tokenize'?", 2),
        (("eval", "zeroshot"), "qlip eval: no command 'zeroshot': did you mean 'zero-shot'?", 2),
        (("xyzzy",), "qlip: no command 'xyzzy'; qlip --help lists them", 2),
        (("train", "tinny"), "qlip: no recipe 'tinny': did you mean 'tiny'?", 1),
        (("train", "um3_tiny"), "did you mean 'um3-tiny'?", 1),
        (("llava", "train", "llava"), "no recipe 'llava'; qlip llava train --help lists them", 1),
        (("info", "--jsno"), "--json", 2),
    ],
)
def test_what_is_misspelt_gets_a_hint(run, words, message, expected):
    code, out, err = run(*words)
    assert code == expected and message in err and not out


@pytest.mark.parametrize("words", functions(), ids=" ".join)
def test_help_names_arguments_and_both_polarities(run, words):
    code, out, _ = run(*words, "--help")
    positional = out.partition("╭─ positional arguments")[2].partition("╰")[0]
    assert code == 0 and "(default: )" not in positional
    assert not re.search(r"│ (STR|PATH|INT|\[)\b", positional)
    flags = re.findall(r"(--[\w.-]+), (--[\w.-]+)", out)
    assert ("--json" in out) == (("--json", "--no-json") in flags)


@pytest.mark.parametrize("recipe", ["tiny", "um3-tiny"])
def test_what_a_recipe_needs_is_required(run, recipe):
    code, out, _ = run("train", recipe, "--help")
    options = {"--data.train"} if recipe == "tiny" else {"--tokens", "--text"}
    blocks = re.split(r"\n[│ ]*(?=--)", out)
    found = {block.split()[0] for block in blocks if "(required)" in block}
    assert code == 0 and options == found & options
    assert ("--compile", "--no-compile") in re.findall(r"(--[\w-]+), (--[\w-]+)", out)


def test_help_does_not_wait_for_pytorch():
    script = (
        "import sys; from qlip.cli.main import _dispatch\n"
        "codes = [_dispatch(words) for words in ([], ['train', '--help'], ['calibrate', '-h'])]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[0, 0, 0] False\n")
    assert all(name in done.stdout for name in ("b16-256-stage2", "t2i-tiny", "um3-1b"))


@pytest.mark.parametrize(
    ("message", "words", "expected"),
    [
        ("batch_size is 0: use 1 or more", "--batch-size 0", "--batch-size is 0: use 1 or more"),
        ("batch_size is 0", "--batch-size=0", "--batch-size is 0"),
        ("num_workers is -1", "--data.num-workers -1", "--data.num-workers is -1"),
        ("data.num_workers is -1", "--data.num-workers -1", "--data.num-workers is -1"),
        ("num is 0", "--num 0", "--num is 0"),
        ("the model is in a", "--model a", "the model is in a"),
        ("/a/batch_size/x.png, batch_size.png: no image", "--batch-size 2", None),
        ("batch_size is 0", "--steps 2", None),
    ],
)
def test_errors_name_options_as_they_were_typed(message, words, expected):
    assert as_typed(message, words.split()) == (expected or message)


def test_types_are_published():
    assert (files("qlip") / "py.typed").is_file()
