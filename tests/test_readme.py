"""README, the pages of docs, the cards, requirements, package metadata and CI say the same."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
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
#: All that is written for readers, by path.
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "hub_configs").glob("*/README.md")),
    )
}
#: Blocks that want a Hub repository, and the one that wants a running demo (tests/test_app_api.py).
NOT_RUN_HERE = ("org/name", "gradio_client")


def code_blocks(language, text):
    """The blocks of a language, also those within lists."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in blocks]


def examples(page):
    """A page's Python blocks that need nothing but the package."""
    blocks = code_blocks("python", PAGES[page])
    return [block for block in blocks if not any(name in block for name in NOT_RUN_HERE)]


def examples_of_its_own(page):
    """Those that are not README's."""
    return set(examples(page)) - set(code_blocks("python", README))


def metaaux_commands(text):
    """What follows `python -m metaaux`, one text a command, without comments."""
    lines = "".join(code_blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].split("metaaux", 1)[1].strip() for line in lines if "python -m metaaux " in line]


def links(text):
    """Targets of a page's links and pictures that are no addresses."""
    return re.findall(r"\]\((?!https?:)([^)]+)\)", text)


def anchors(text):
    """Names by which a page's headings can be linked to, as GitHub and the Hub make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def requirements(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {r.name: r for r in (Requirement(line) for line in lines if line and not line.startswith("-r"))}


@pytest.fixture(scope="module")
def headed_folder(tiny_components, tmp_path_factory):
    """Folder of a tiny pipeline whose heads have a surface, with one editing direction."""
    from metaaux import MetaAuxInverter
    from metaaux.models.directions import Direction, LatentDirections

    generator = copy.deepcopy(tiny_components["generator"])
    generator.decoder.out.weight[0] *= 50
    normal = torch.nn.functional.normalize(torch.arange(1.0, 17.0), dim=0)
    smile = Direction("smile", "interfacegan", normal, 5.0, -3.0, 3.0, 0.9, "smiles more")
    components = tiny_components | {
        "generator": generator,
        "latent_directions": LatentDirections.from_directions([smile]),
    }
    folder = tmp_path_factory.mktemp("headed-model") / "tiny"
    MetaAuxInverter(**components, inner_steps=1).save_pretrained(folder)
    return folder


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

    def test_metaaux_commands_exist(self):
        from typer.main import get_command

        from metaaux.cli import app

        commands = get_command(app).commands
        lines = [line for text in PAGES.values() for line in metaaux_commands(text)]
        assert {line.split()[0] for line in lines} == set(commands)
        for line in lines:
            words = line.split()
            command = commands[words[0]]
            if len(words) > 1:
                command = getattr(command, "commands", {}).get(words[1], command)
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, line

    def test_scripts_exist(self):
        scripts = {name for text in PAGES.values() for name in re.findall(r"python ([\w/]+\.py)", text)}
        assert {"app.py", "docs/figures.py", "docs/pictures.py", "docs/screenshots/make.py"} <= scripts
        assert all((ROOT / script).is_file() for script in scripts)

    def test_configurations_exist_and_load(self):
        from metaaux.training.settings import load_settings

        found = {pair for text in PAGES.values() for pair in re.findall(r"train (\w+) --config (\S+)", text)}
        assert {part for part, _ in found} == {"generator", "encoder", "identity", "auxiliary", "directions"}
        for part, path in found:
            module = importlib.import_module(f"metaaux.training.{part}")
            load_settings(getattr(module, f"{part.capitalize()}Config"), ROOT / path)
        mini = ROOT / "metaaux" / "configs" / "mini"
        assert {path for _, path in found if "/mini/" in path} == {
            str(path.relative_to(ROOT)) for path in mini.glob("*.yaml")
        }


class TestPythonExamples:
    @pytest.mark.parametrize("page", PAGES)
    def test_use_public_names(self, page):
        import metaaux

        for block in code_blocks("python", PAGES[page]):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module == "metaaux":
                    assert {alias.name for alias in node.names} <= set(metaaux.__all__)
                elif isinstance(node, ast.ImportFrom) and node.module.startswith("metaaux."):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "inverter":
                    assert hasattr(metaaux.MetaAuxInverter, node.attr), node.attr

    @pytest.mark.parametrize("page", ["README.md", *(page for page in PAGES if examples_of_its_own(page))])
    def test_run(self, page, headed_folder, tmp_path, monkeypatch):
        """As they stand, one after the other, but for a model of seconds, which knows one edit, fewer views and a
        coarse mesh."""
        pytest.importorskip("mediapipe")
        code = "\n".join(examples(page)).replace(".from_pretrained()", f".from_pretrained({str(headed_folder)!r})")
        code = re.sub(r"edits=\{.+?\}", 'edits={"smile": 1.0}', code).replace("frames=60", "frames=3")
        code = code.replace('"head.glb")', '"head.glb", resolution=32, texture=64)')
        code = code.replace("turntable(inversion)", "turntable(inversion, yaws=(-20, 0, 20))")
        for name in set(re.findall(r"[\w-]+\.jpg", code)):
            shutil.copy(ROOT / "examples" / "eileen_collins.jpg", tmp_path / name)
        (tmp_path / "hub_configs").symlink_to(ROOT / "hub_configs")
        monkeypatch.chdir(tmp_path)
        exec(compile(code, page, "exec"), {})
        for name in re.findall(r"(?:export_mesh|save)\(.*?\"(.+?)\"", code):
            assert (tmp_path / name).stat().st_size > 0

    def test_quick_start_is_the_same_everywhere(self):
        quick_start = examples("README.md")[0]
        assert "from_pretrained()" in quick_start and "invert(" in quick_start
        assert quick_start in code_blocks("python", PAGES["hub_configs/metaaux-mini/README.md"])


class TestLinks:
    @pytest.mark.parametrize("page", PAGES)
    def test_lead_somewhere(self, page):
        for link in links(PAGES[page]):
            target, _, anchor = link.partition("#")
            path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
            assert path.exists(), link
            if anchor:
                assert anchor in anchors(path.read_text(encoding="utf-8")), link
            if page.startswith("hub_configs"):
                assert path.is_relative_to((ROOT / page).parent), f"{link} does not come along to the Hub"

    @pytest.mark.parametrize("page", PAGES)
    def test_named_paths_exist(self, page):
        named = re.findall(r"`((?:metaaux|docs|tests|hub_configs|examples)/[\w./-]+)`", PAGES[page])
        assert [path for path in named if not (ROOT / path).exists()] == []

    def test_every_page_can_be_reached_from_readme(self):
        reached, waiting = set(), ["README.md"]
        while waiting:
            page = waiting.pop()
            reached.add(page)
            targets = {((ROOT / page).parent / link.partition("#")[0]).resolve() for link in links(PAGES[page])}
            waiting += {str(path.relative_to(ROOT)) for path in targets} & PAGES.keys() - reached
        assert reached == PAGES.keys()

    def test_pictures_are_used_and_small(self):
        pictures = {path for end in ("png", "jpg", "webp") for path in (ROOT / "docs").rglob(f"*.{end}")}
        shown = {((ROOT / page).parent / link).resolve() for page, text in PAGES.items() for link in links(text)}
        assert pictures <= shown
        assert max(path.stat().st_size for path in pictures) <= 600_000
        assert max(path.stat().st_size for path in (ROOT / "docs" / "screenshots").glob("*.png")) <= 250_000


class TestDeploying:
    def test_lists_every_setting(self):
        page = PAGES["docs/deploying.md"]
        # Read, not imported, for Gradio's sake.
        source = (ROOT / "metaaux" / "demo" / "settings.py").read_text(encoding="utf-8")
        names = re.compile(r"METAAUX_[A-Z_]*[A-Z]")
        assert set(names.findall(page)) == set(names.findall(source))
        numbers = re.findall(r"^\| `METAAUX_(\w+)` \| (\d+) \|", page, re.MULTILINE)
        assert len(numbers) >= 6
        defaults = dict(re.findall(r"^    (\w+): \w+ = (\w+)$", source, re.MULTILINE))
        assert all(int(value) == ast.literal_eval(defaults[name.lower()]) for name, value in numbers)


def test_evaluation_lists_every_method():
    from metaaux.baselines import METHODS

    rows = re.findall(r"^\| (`.+?) \|", PAGES["docs/evaluation.md"], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([\w+]+)`", row)} == set(METHODS)


def equations(text):
    """Numbers of the equations that a text refers to, singly (Eq. 8) or from one to another (Eq. 8-12)."""
    found = re.findall(r"Eq\. (\d+)(?:(?:-| to Eq\. )(\d+))?", text)
    return {number for first, last in found for number in range(int(first), int(last or first) + 1)}


class TestTour:
    """The table that leads from the paper to the code."""

    ROWS = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGES["docs/paper-to-code.md"].splitlines()
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
        assert paths and all((ROOT / "docs" / path).exists() for path in paths)
        texts = [(ROOT / "docs" / path).read_text(encoding="utf-8") for path in paths if path.endswith(".py")]
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
            # A program of its own that the official code's folder is given to.
            official = {"torch_utils", "training"} if path.name == "official_worker.py" else set()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                # Triton comes with PyTorch's CUDA builds, and is imported where there is one only.
                known = {*sys.stdlib_module_names, "metaaux", "triton"} | official
                for module in {name.split(".")[0] for name in names} - known:
                    # One that is nothing but a compiled module is not listed (xatlas); it has the module's name.
                    distributions = {d.lower().replace("_", "-") for d in modules.get(module, [module])}
                    assert distributions & allowed, f"{path.relative_to(ROOT)} imports {module}"
