"""What a Space is made from: README's front matter, and what is installed by pre-requirements.txt, packages.txt,
requirements.txt and the platform itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceHardware
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
SPACE = yaml.safe_load((ROOT / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1])
#: PyTorch that ZeroGPU takes (November 2026).
ZERO_GPU_TORCH = SpecifierSet(">=2.8,<2.12")


def requirements(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {r.name: r.specifier for r in (Requirement(line) for line in lines if line)}


def have_a_version_in_common(one, other):
    """Whether two ranges overlap, by the versions that they name, and those just above and below."""
    named = [Version(specifier.version.removesuffix(".*")) for specifier in [*one, *other]]
    candidates = [v for version in named for v in (version, Version(f"{version}.post1"), _just_below(version))]
    return any(one.contains(version) and other.contains(version) for version in candidates)


def _just_below(version):
    release = list(version.release)
    while release and release[-1] == 0:
        release.pop()
    return Version(".".join(map(str, [*release[:-1], release[-1] - 1, 999])) if release else "0")


class TestFrontMatter:
    def test_versions_are_those_of_the_requirements(self):
        project = (ROOT / "pyproject.toml").read_text()
        pythons = re.search(r'^requires-python = "(.*)"$', project, re.MULTILINE)[1]
        assert SpecifierSet(pythons).contains(f"{SPACE['python_version']}.0")
        assert SPACE["python_version"] in ("3.10", "3.12"), "ZeroGPU has no other"
        assert requirements("requirements.txt")["gradio"].contains(SPACE["sdk_version"])

    def test_hardware_exists(self):
        assert SpaceHardware(SPACE["suggested_hardware"]) is SpaceHardware.ZERO_A10G
        assert re.fullmatch(r"\d+(m|h)", SPACE["startup_duration_timeout"])

    def test_models_and_picture_exist(self):
        folders = {path.parent.name for path in (ROOT / "hub_configs").glob("*/model_index.json")}
        assert {model.split("/")[1] for model in SPACE["models"]} == folders
        assert all(model.count("/") == 1 for model in SPACE["models"])
        repository, file = SPACE["thumbnail"].removeprefix("https://huggingface.co/spaces/").split("/resolve/main/")
        assert repository.split("/")[0] == SPACE["models"][0].split("/")[0] and (ROOT / file).is_file()

    def test_it_is_found_as_a_server_of_tools(self):
        assert "mcp-server" in SPACE["tags"] and len(set(SPACE["tags"])) == len(SPACE["tags"])


class TestRequirements:
    def test_torch_is_the_newest_that_zero_gpu_takes(self):
        (torch,) = requirements("pre-requirements.txt").items()
        assert torch[0] == "torch"
        (specifier,) = torch[1]
        assert specifier.operator == "=="
        assert ZERO_GPU_TORCH.contains(specifier.version)
        assert requirements("requirements.txt")["torch"].contains(specifier.version)

    def test_system_packages_are_those_of_readme(self):
        named = re.search(r"^apt-get install --yes (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)[1].split()
        assert (ROOT / "packages.txt").read_text().split() == [name for name in named if name != "chromium"]

    @pytest.mark.parametrize("package", ["gradio", "spaces"])
    def test_what_the_platform_adds_overlaps_with_ours(self, package):
        """As `pip` has it installed here; the whole is resolved by the test below."""
        ours = {canonicalize_name(name): specifier for name, specifier in requirements("requirements.txt").items()}
        environments = [{"extra": extra, "python_version": SPACE["python_version"]} for extra in ("", "oauth", "mcp")]
        shared = 0
        for line in importlib.metadata.requires(package):
            theirs = Requirement(line)
            name = canonicalize_name(theirs.name)
            asked = theirs.marker is None or any(theirs.marker.evaluate(environment) for environment in environments)
            if asked and name in ours:
                shared += 1
                assert have_a_version_in_common(ours[name], theirs.specifier), line
        assert shared > 1

    @pytest.mark.parametrize(
        ("one", "other", "overlap"),
        [
            (">=2.11,<3", "<=2.12.5,>=2.11.10", True),
            (">=2.13,<3", "<=2.12.5,>=2.11.10", False),
            ("==1.2.*", ">=1.2.5", True),
            ("<2", ">=2", False),
            (">=1", "", True),
        ],
    )
    def test_ranges_overlap(self, one, other, overlap):
        assert have_a_version_in_common(SpecifierSet(one), SpecifierSet(other)) == overlap

    @pytest.mark.network
    @pytest.mark.skipif(os.environ.get("METAAUX_NETWORK") != "1", reason="asks package indexes: set METAAUX_NETWORK=1")
    def test_all_can_be_installed_together(self, tmp_path):
        """pip's dry run of what a Space installs, for its Python, whichever runs this test."""
        platform = [f"gradio[oauth,mcp]=={SPACE['sdk_version']}", "spaces"]
        files = ["-r", "pre-requirements.txt", "-r", "requirements.txt"]
        report = tmp_path / "report.json"
        python = ["--python-version", SPACE["python_version"], "--only-binary=:all:", "--target", str(tmp_path / "to")]
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(report)]
        done = subprocess.run([*command, *python, *files, *platform], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        installed = {item["metadata"]["name"]: item["metadata"] for item in json.loads(report.read_text())["install"]}
        assert requirements("pre-requirements.txt")["torch"].contains(installed["torch"]["version"])
        assert installed["gradio"]["version"] == SPACE["sdk_version"] and {"mcp", "spaces"} <= set(installed)
