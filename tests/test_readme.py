"""README, requirements, package metadata and CI say the same."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FRONT_MATTER, TEXT = README.split("---\n", 2)[1:]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def code_blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def requirements(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {r.name: r for r in (Requirement(line) for line in lines if line and not line.startswith("-r"))}


class TestSpace:
    def test_front_matter(self):
        space = yaml.safe_load(FRONT_MATTER)
        assert space["sdk"] == "gradio" and space["app_file"] == "app.py" and space["license"] == "apache-2.0"
        assert requirements("requirements.txt")["gradio"].specifier.contains(space["sdk_version"])
        assert space["python_version"] == "3.12"
        assert len(space["short_description"]) <= 60

    def test_app_exists(self):
        assert (ROOT / yaml.safe_load(FRONT_MATTER)["app_file"]).is_file()


class TestCommands:
    @pytest.mark.parametrize(
        "line",
        [
            "pip install -r requirements.txt && python app.py",
            "pip install -r requirements-dev.txt && python -m pytest",
        ],
    )
    def test_the_two_lines_stand_alone(self, line):
        assert README.splitlines().count(line) == 1

    def test_python_examples_parse_and_use_public_names(self):
        import metaaux

        blocks = code_blocks("python")
        assert len(blocks) >= 4
        for block in blocks:
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module == "metaaux":
                    assert {alias.name for alias in node.names} <= set(metaaux.__all__)
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "inverter":
                    assert hasattr(metaaux.MetaAuxInverter, node.attr), node.attr

    def test_metaaux_commands_exist(self):
        from typer.main import get_command

        from metaaux.cli import app

        commands = get_command(app).commands
        lines = re.findall(r"^python -m metaaux (.*)$", TEXT, re.MULTILINE)
        assert {line.split()[0] for line in lines} == set(commands)
        for line in lines:
            words = line.split("#")[0].split()
            command = commands[words[0]]
            if len(words) > 1:
                command = getattr(command, "commands", {}).get(words[1], command)
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, line

    def test_configurations_exist_and_load(self):
        import importlib

        from metaaux.training.settings import load_settings

        found = re.findall(r"train (\w+) --config (\S+)", TEXT)
        assert {part for part, _ in found} == {"generator", "encoder", "identity", "auxiliary", "directions"}
        for part, path in found:
            module = importlib.import_module(f"metaaux.training.{part}")
            load_settings(getattr(module, f"{part.capitalize()}Config"), ROOT / path)
        assert {path for _, path in found} == {
            str(path.relative_to(ROOT)) for path in (ROOT / "metaaux" / "configs" / "mini").glob("*.yaml")
        }

    def test_links_lead_somewhere(self):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
            assert (ROOT / target).exists(), target


def equations(text):
    """Numbers of the equations that a text refers to, singly (Eq. 8) or from one to another (Eq. 8-12)."""
    found = re.findall(r"Eq\. (\d+)(?:(?:-| to Eq\. )(\d+))?", text)
    return {number for first, last in found for number in range(int(first), int(last or first) + 1)}


class TestTour:
    """The table that leads from the paper to the code."""

    ROWS = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TEXT.split("## From the paper to the code")[1].split("\n## ")[0].splitlines()
        if line.startswith("| ")
    ][1:]

    def test_has_every_equation_and_table(self):
        places = "; ".join(row[0] for row in self.ROWS)
        assert equations(places) == set(range(1, 13))
        wanted = ["Table 1", "Table 2", "Table 3", "Alg. 1"]
        wanted += [f"Sec. {section}" for section in ("3.1", "3.2", "3.3", "4.1", "4.5")]
        assert [place for place in wanted if not re.search(rf"{re.escape(place)}\b", places)] == []

    @pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
    def test_files_speak_of_the_equations_that_they_are_named_for(self, row):
        paths = re.findall(r"\]\((.*?)\)", row[2])
        assert paths and all((ROOT / path).exists() for path in paths)
        texts = [(ROOT / path).read_text(encoding="utf-8") for path in paths if path.endswith(".py")]
        assert equations(row[0]) <= equations(" ".join(texts))


class TestContinuousIntegration:
    def test_reads_packages_and_test_line_from_readme(self):
        script = (ROOT / ".ci" / "run").read_text()
        expression = re.search(r"sed -n '(.*?)' README.md", script)[1]
        packages = subprocess.run(
            ["sed", "-n", expression, "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        assert packages and all(f"`{package}`" in TEXT for package in packages)
        assert re.search(r"grep -xF '(.*?)' README.md", script)[1] in README.splitlines()

    def test_script_is_valid_and_executable(self):
        script = ROOT / ".ci" / "run"
        assert script.stat().st_mode & 0o111
        subprocess.run(["bash", "-n", script], check=True)


class TestPackage:
    def test_every_package_is_listed(self):
        found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "metaaux").rglob("__init__.py")}
        assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"metaaux.hub_configs"}

    def test_extras_are_what_the_requirements_say(self):
        extras = {
            name: {r.name: r for r in map(Requirement, lines)}
            for name, lines in PROJECT["project"]["optional-dependencies"].items()
        }
        for name, requirement in extras["train"].items():
            assert requirement.specifier == requirements("requirements-dev.txt")[name].specifier
        assert extras["demo"]["gradio"].specifier == requirements("requirements.txt")["gradio"].specifier

    def test_package_data_exists(self):
        folders = PROJECT["tool"]["setuptools"]["package-dir"]
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
            folder = ROOT / folders.get(package, package.replace(".", "/"))
            for pattern in patterns:
                assert any(folder.glob(pattern)), (package, pattern)

    @pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
    def test_requirements_are_bounded_and_met_here(self, name):
        for requirement in requirements(name).values():
            operators = {specifier.operator for specifier in requirement.specifier}
            assert operators & {"<", "=="}, f"{requirement} has no upper bound"
            installed = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(installed.split("+")[0]), (str(requirement), installed)

    def test_imports_are_required(self):
        """Every third-party module that the package imports is in requirements.txt (training's in the dev file)."""
        modules = importlib.metadata.packages_distributions()
        required = {name.lower().replace("_", "-") for name in requirements("requirements.txt")}
        training = {name.lower().replace("_", "-") for name in requirements("requirements-dev.txt")}
        for path in (ROOT / "metaaux").rglob("*.py"):
            allowed = required | training if "training" in path.parts else required
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                # Triton comes with PyTorch's CUDA builds, and is imported where there is one only.
                known = {*sys.stdlib_module_names, "metaaux", "triton"}
                for module in {name.split(".")[0] for name in names} - known:
                    # One that is nothing but a compiled module is not listed (xatlas); it has the module's name.
                    distributions = {d.lower().replace("_", "-") for d in modules.get(module, [module])}
                    assert distributions & allowed, f"{path.relative_to(ROOT)} imports {module}"
