# SPDX-License-Identifier: Apache-2.0
"""What holds for the repository as a whole."""

import argparse
import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("make_preference_data", "train_dpo_human", "eval_human")
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
README = (ROOT / "README.md").read_text()


def dependencies(source: str) -> set[str]:
    """The dependencies of the script's PEP 723 block."""
    block = re.search(r"^# /// script\n(.*?)^# ///$", source, re.MULTILINE | re.DOTALL).group(1)
    listed = re.search(r"dependencies = (\[.*?\n\])", re.sub(r"^# ?", "", block, flags=re.MULTILINE), re.DOTALL).group(
        1
    )
    return set(ast.literal_eval(listed))


def parser_of(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The script's own parser, caught when it parses."""

    class Caught(Exception):
        pass

    caught = []

    def catch(parser, *args, **kwargs):
        caught.append(parser)
        raise Caught

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    with pytest.raises(Caught):
        importlib.import_module(name).parse_args([])
    return caught[0]


def test_requirements_are_the_union_of_the_scripts():
    lines = {line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert {line for line in lines if line and not line.startswith("#")} == set().union(
        *map(dependencies, SOURCES.values())
    )


def test_every_requirement_has_both_bounds_and_torchvision_is_not_among_them():
    for requirement in set().union(*map(dependencies, SOURCES.values())):
        assert re.search(r">=[\d.]+,<[\d.]+", requirement), requirement
        assert not requirement.startswith("torchvision")


@pytest.mark.parametrize("name", SCRIPTS)
def test_declared_flags_are_read_and_read_flags_declared(name, monkeypatch):
    declared = {action.dest for action in parser_of(name, monkeypatch)._actions} - {"help"}
    read = set(re.findall(r"\bargs\.([a-z_0-9]+)", SOURCES[name]))
    assert declared == read


@pytest.mark.parametrize("name", SCRIPTS)
def test_world_settings_are_flags(name, monkeypatch):
    import json

    settings = json.loads((ROOT / "tests" / "tiny_human" / "settings.json").read_text())
    assert settings[name].keys() <= {action.dest for action in parser_of(name, monkeypatch)._actions}


def names_of(node: ast.stmt) -> list[str]:
    """What a statement of a script defines: a function, a class, or constants."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]


def test_what_stands_in_two_scripts_is_equal():
    """Functions, classes and constants, to the letter."""
    seen: dict[str, dict[str, str]] = {}
    for script, source in SOURCES.items():
        lines = source.splitlines()
        for node in ast.parse(source).body:
            for name in names_of(node):
                text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                copies = seen.setdefault(name, {})
                copies[script] = copies.get(script, "") + text
    shared = {name: copies for name, copies in seen.items() if len(copies) > 1}
    assert {"use_embedded_world", "UNet", "load_clip", "read_image"} <= shared.keys()
    own = {"main", "parse_args", "build_parser", "PAGE", "CSS"}
    assert [name for name, copies in shared.items() if name not in own and len(set(copies.values())) > 1] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_self_contained(name):
    imported = re.findall(r"^\s*(?:from|import) ([a-z_]+)", SOURCES[name], re.MULTILINE)
    assert not set(imported) & {"torchvision", *SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_public_functions_have_docstrings(name):
    functions = [node for node in ast.parse(SOURCES[name]).body if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if not f.name.startswith("_") and not ast.get_docstring(f)] == []


def test_flags_in_the_readme_exist(monkeypatch):
    commands = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for command in " ".join(commands).replace("\\\n", " ").replace("&&", "\n").splitlines():
        script = re.search(r"(\w+)\.py", command)
        if script and script.group(1) in SCRIPTS:
            known = {
                flag for action in parser_of(script.group(1), monkeypatch)._actions for flag in action.option_strings
            }
            used = set(re.findall(r"(--\w+)", command.split(".py", 1)[1]))
            assert used <= known, command


def test_the_readme_explains_every_logged_metric():
    functions = {getattr(node, "name", None): node for node in ast.parse(SOURCES["train_dpo_human"]).body}
    returned = functions["pair_losses"].body[-1].value
    names = {*map(ast.literal_eval, returned.keys), "grad_norm", "lr", "pairs_per_second"}
    assert "loss/dpo" in names
    explained = set(re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (`.+?) \|", README, re.MULTILINE))))
    assert names <= explained


def test_the_embedded_world_is_small_and_has_no_pickles():
    listed = subprocess.run(
        ["git", "ls-files", "tests/tiny_human"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / line for line in listed.stdout.splitlines()]
    assert sum(file.stat().st_size for file in files) < 30e6
    assert not [file for file in files if file.suffix in {".pt", ".bin", ".pkl", ".ckpt", ".npy"}]


def test_prompts_are_disjoint():
    train, test = (
        (ROOT / "tests" / "tiny_human" / f"prompts_{s}.txt").read_text().splitlines() for s in ("train", "test")
    )
    assert len(set(train)) == 1024
    assert len(set(test)) == 512
    assert not set(train) & set(test)
