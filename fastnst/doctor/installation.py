"""Python and the packages: there, of a version that goes together, and fit for work."""

import importlib
import platform
import subprocess
import warnings
from importlib import metadata
from typing import Any

from fastnst.doctor.children import Facts, in_words
from fastnst.doctor.verdict import Verdict, failed, passed, warned

# Of these, more than the version is looked at: they have lines of their own.
_OWN_LINES = ("torch", "triton", "tensorboard", "pillow")
_DALI = "nvidia-dali"


def probe_packages() -> dict[str, Any]:
    """Which versions are there, and which `fastnst` and torch ask for, out of their own metadata."""
    from packaging.requirements import Requirement

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "fastnst": _version("fastnst"),
        "triton": _version("triton"),
        "requires_python": None,
        "python_fits": True,
        "triton_pin": None,
        "packages": {},
    }
    if found["fastnst"] is not None:
        own = metadata.distribution("fastnst")
        if "Requires-Python" in own.metadata:
            found["requires_python"] = requires_python = own.metadata["Requires-Python"]
            found["python_fits"] = Requirement(f"python{requires_python}").specifier.contains(found["python"], True)
        for requirement in map(Requirement, own.requires or ()):
            if "extra" not in str(requirement.marker):
                found["packages"][requirement.name] = _package(requirement)
    for requirement in map(Requirement, _requires("torch")):
        if requirement.name == "triton" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found["triton_pin"] = str(requirement.specifier)
            found["triton_pairs"] = requirement.specifier.contains(found["triton"] or "0", True)
    return found


def probe_torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"broken": in_words(error)}
    return {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def probe_triton() -> dict[str, Any]:
    try:
        import triton  # noqa: F401
    except (ImportError, OSError) as error:
        return {"broken": in_words(error)}
    return {}


def probe_tensorboard() -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # What writes the log, rather than `tensorboard` alone: it needs more of it.
            import torch.utils.tensorboard  # noqa: F401
        import tensorboard
    except (ImportError, OSError) as error:
        return {"broken": in_words(error)}
    version = tensorboard.__version__
    try:
        if (binary := importlib.import_module("tensorboard_data_server").server_binary()) is None:
            return {"version": version, "server": None, "why": "it does not exist for this platform"}
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        return {"version": version, "server": None, "why": in_words(error)}
    return {"version": version, "server": done.stdout.split()[-1]}


def judge_python(facts: Facts) -> Verdict:
    packages = facts["packages"]
    found = f"{packages['python']}, {packages['implementation']}"
    if not packages["python_fits"]:
        wanted = packages["requires_python"]
        return failed(f"{found}; fastnst needs {wanted}", f"make an environment with Python {wanted} and install there")
    return passed(found)


def judge_platform(facts: Facts) -> Verdict:
    packages = facts["packages"]
    parts = (f"{packages['system']} {packages['release']}", packages["machine"], packages["libc"])
    found = ", ".join(part for part in parts if part)
    if (packages["system"], packages["machine"]) != ("Linux", "x86_64"):
        return warned(
            f"{found}; DALI and the Triton kernels are for Linux on x86-64",
            "use --loader pillow; the kernels' PyTorch paths run by themselves",
        )
    return passed(found)


def judge_packages(facts: Facts) -> Verdict:
    packages = facts["packages"]
    if packages["fastnst"] is None:
        return warned(
            "fastnst runs from a source tree that is not installed, so the versions it needs are not known",
            "install it, from the folder that holds pyproject.toml:\n  pip install --editable .",
        )
    others = {
        name: package
        for name, package in packages["packages"].items()
        if package["needed"] and name not in _OWN_LINES and not name.startswith(_DALI)
    }
    wrong = {name: package for name, package in others.items() if not package["fits"]}
    if wrong:
        listed = ", ".join(f"{name} {p['version'] or 'is missing'} (needs {p['wanted']})" for name, p in wrong.items())
        command = pip_install(*(name + package["wanted"] for name, package in wrong.items()))
        return failed(listed, f"install what fits:\n  {command}")
    listed = ", ".join(f"{name} {package['version']}" for name, package in others.items())
    return passed(f"fastnst {packages['fastnst']}; {listed}")


def judge_torch(facts: Facts) -> Verdict:
    torch, wanted = facts["torch"], wanted_version(facts, "torch")
    if "broken" in torch:
        return failed(f"cannot be imported: {torch['broken']}", f"install it:\n  {pip_install('torch' + wanted)}")
    found = f"{torch['version']}, " + (f"CUDA {torch['cuda']} build" if torch["cuda"] else "CPU build")
    if not fits(facts, "torch"):
        return failed(f"{found}; fastnst needs {wanted}", f"install one that fits:\n  {pip_install('torch' + wanted)}")
    if not torch["cuda"] and (gpus := facts.get("driver").get("gpus")):
        return warned(
            f"{found}, beside {gpus} NVIDIA GPU{'s' if gpus > 1 else ''}, which it cannot use",
            "install the CUDA build, which is what pip installs by default on Linux:\n"
            f"  pip uninstall --yes torch && {pip_install('torch' + wanted)}",
        )
    return passed(found)


def judge_triton(facts: Facts) -> Verdict:
    packages = facts["packages"]
    pin, known = packages["triton_pin"], packages["packages"].get("triton", {})
    install = pip_install("triton" + (pin or known.get("wanted", "")))
    version = packages["triton"]
    if version is None:
        return warned("not installed: the kernels' PyTorch paths run, slower on a GPU", f"install it:\n  {install}")
    if "broken" in facts["triton"]:
        found = f"{version} cannot be imported: {facts['triton']['broken']}; the kernels' PyTorch paths run"
        return warned(found, f"install it anew:\n  {install.replace('install', 'install --force-reinstall', 1)}")
    if pin is not None and not packages["triton_pairs"]:
        return warned(f"{version}; the installed torch is made for {pin}", f"install the pair:\n  {install}")
    if not known.get("fits", True):
        return failed(f"{version}; fastnst needs {known['wanted']}", f"install one that fits:\n  {install}")
    return passed(version + (", as torch asks for" if pin else "; torch's CPU build asks for none"))


def judge_tensorboard(facts: Facts) -> Verdict:
    tensorboard, wanted = facts["tensorboard"], wanted_version(facts, "tensorboard")
    install = pip_install("tensorboard" + wanted)
    if "broken" in tensorboard:
        found = f"cannot be imported: {tensorboard['broken']}; training writes its log with it"
        return failed(found, f"install it:\n  {install}")
    version = tensorboard["version"]
    if not fits(facts, "tensorboard"):
        return failed(f"{version}; fastnst needs {wanted}", f"install one that fits:\n  {install}")
    if tensorboard["server"] is None:
        return warned(
            f"{version}, without its data server ({tensorboard['why']}): logs load slowly",
            f"install it, if long logs are a trouble:\n  {pip_install('tensorboard-data-server')}",
        )
    return passed(f"{version}, data server {tensorboard['server']}")


def versions(facts: Facts) -> dict[str, str | None]:
    """What matters to whoever reads a report, by name."""
    packages, driver = facts.get("packages"), facts.get("driver")
    named = {name: package["version"] for name, package in packages.get("packages", {}).items()}
    return {
        "fastnst": packages.get("fastnst"),
        "python": packages.get("python"),
        **named,
        "cuda": facts.get("torch").get("cuda"),
        "nvidia-driver": driver.get("version"),
    }


def fits(facts: Facts, name: str) -> bool:
    """Whether a package's version is in the range that `fastnst` asks for, as far as that is known."""
    return bool(facts.get("packages").get("packages", {}).get(name, {}).get("fits", True))


def wanted_version(facts: Facts, name: str) -> str:
    """The range that `fastnst` asks for, such as `>=2.11`; empty where that is not known."""
    return str(facts.get("packages").get("packages", {}).get(name, {}).get("wanted", ""))


def pip_install(*requirements: str) -> str:
    """The command. Quoted, because a shell takes `>` for a redirection."""
    return "pip install " + " ".join(f"'{each}'" if set(each) & set("<>!~*;") else each for each in requirements)


def _package(requirement: Any) -> dict[str, Any]:
    version = _version(requirement.name)
    return {
        "version": version,
        "wanted": str(requirement.specifier),
        "fits": version is not None and requirement.specifier.contains(version, True),
        "needed": requirement.marker is None or requirement.marker.evaluate({"extra": ""}),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _requires(distribution: str) -> list[str]:
    try:
        return metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []
