"""Python and packages: present, compatible, importable."""

import contextlib
import importlib
import platform
import subprocess
import warnings
from importlib import metadata
from typing import Any

from fastnst.doctor.verdict import Verdict, failed, passed, warned
from fastnst.doctor.workers import Results, format_error

# Checked beyond their versions, on lines of their own.
_OWN_LINES = ("torch", "triton", "tensorboard", "pillow")
_DALI = "nvidia-dali"


def probe_packages() -> dict[str, Any]:
    """Compare installed versions with what the metadata of `fastnst` and torch ask for."""
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
        return {"broken": format_error(error)}
    return {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def probe_triton() -> dict[str, Any]:
    try:
        import triton  # noqa: F401
    except (ImportError, OSError) as error:
        return {"broken": format_error(error)}
    return {}


def probe_tensorboard() -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # The log writer needs more of tensorboard than `import tensorboard` does.
            import torch.utils.tensorboard  # noqa: F401
        import tensorboard
    except (ImportError, OSError) as error:
        return {"broken": format_error(error)}
    version = tensorboard.__version__
    try:
        if (binary := importlib.import_module("tensorboard_data_server").server_binary()) is None:
            return {"version": version, "server": None, "why": "it does not exist for this platform"}
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        return {"version": version, "server": None, "why": format_error(error)}
    return {"version": version, "server": done.stdout.split()[-1]}


def check_python(results: Results) -> Verdict:
    packages = results["packages"]
    found = f"{packages['python']}, {packages['implementation']}"
    if not packages["python_fits"]:
        wanted = packages["requires_python"]
        return failed(f"{found}; fastnst needs {wanted}", f"make an environment with Python {wanted} and install there")
    return passed(found)


def check_platform(results: Results) -> Verdict:
    packages = results["packages"]
    parts = (f"{packages['system']} {packages['release']}", packages["machine"], packages["libc"])
    found = ", ".join(part for part in parts if part)
    if (packages["system"], packages["machine"]) != ("Linux", "x86_64"):
        return warned(
            f"{found}; DALI and the Triton kernels are for Linux on x86-64",
            "use --loader pillow; the kernels' PyTorch paths run by themselves",
        )
    return passed(found)


def check_packages(results: Results) -> Verdict:
    packages = results["packages"]
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


def check_torch(results: Results) -> Verdict:
    if (verdict := unusable(results, "torch")) is not None:
        return verdict
    torch = results["torch"]
    found = f"{torch['version']}, " + (f"CUDA {torch['cuda']} build" if torch["cuda"] else "CPU build")
    if not torch["cuda"] and (gpus := results.get("driver").get("gpus")):
        return warned(
            f"{found} cannot use this machine's {gpus} NVIDIA GPU{'s' if gpus > 1 else ''}",
            "install the CUDA build, pip's default on Linux:\n"
            f"  pip uninstall --yes torch && {pip_install('torch' + wanted_version(results, 'torch'))}",
        )
    return passed(found)


def check_triton(results: Results) -> Verdict:
    packages = results["packages"]
    pin, known = packages["triton_pin"], packages["packages"].get("triton", {})
    install = pip_install("triton" + (pin or known.get("wanted", "")))
    version = packages["triton"]
    if version is None:
        return warned("not installed: the kernels' PyTorch paths run, slower on a GPU", f"install it:\n  {install}")
    if "broken" in results["triton"]:
        found = f"{version} cannot be imported: {results['triton']['broken']}; the kernels' PyTorch paths run"
        return warned(found, f"reinstall it:\n  {install.replace('install', 'install --force-reinstall', 1)}")
    if pin is not None and not packages["triton_pairs"]:
        return warned(f"{version}; the installed torch is made for {pin}", f"install the pair:\n  {install}")
    if not known.get("fits", True):
        return failed(f"{version}; fastnst needs {known['wanted']}", f"install one that fits:\n  {install}")
    return passed(version + (", as torch asks for" if pin else "; torch's CPU build asks for none"))


def check_tensorboard(results: Results) -> Verdict:
    if (verdict := unusable(results, "tensorboard")) is not None:
        return verdict
    tensorboard = results["tensorboard"]
    if tensorboard["server"] is None:
        return warned(
            f"{tensorboard['version']}, without its data server ({tensorboard['why']}): logs load slowly",
            f"install it if long logs load too slowly:\n  {pip_install('tensorboard-data-server')}",
        )
    return passed(f"{tensorboard['version']}, data server {tensorboard['server']}")


def unusable(results: Results, name: str) -> Verdict | None:
    """Return FAIL if a package cannot be imported or is of a wrong version; probe and package have the same name."""
    package, wanted = results[name], wanted_version(results, name)
    install = pip_install(name + wanted)
    if "broken" in package:
        return failed(f"cannot be imported: {package['broken']}", f"install it:\n  {install}")
    if not fits(results, name):
        return failed(f"{package['version']}; fastnst needs {wanted}", f"install one that fits:\n  {install}")
    return None


def versions(results: Results) -> dict[str, str | None]:
    """Return the versions that a bug report needs, by name."""
    packages, driver = results.get("packages"), results.get("driver")
    named = {name: package["version"] for name, package in packages.get("packages", {}).items()}
    return {
        "fastnst": packages.get("fastnst"),
        "python": packages.get("python"),
        **named,
        "cuda": results.get("torch").get("cuda"),
        "nvidia-driver": driver.get("version"),
    }


def fits(results: Results, name: str) -> bool:
    """Return whether a package's version is in the range of `fastnst`, True if unknown."""
    return bool(results.get("packages").get("packages", {}).get(name, {}).get("fits", True))


def wanted_version(results: Results, name: str) -> str:
    """Return the range that `fastnst` asks for, such as `>=2.11`, or "" if unknown."""
    return str(results.get("packages").get("packages", {}).get(name, {}).get("wanted", ""))


def pip_install(*requirements: str) -> str:
    """Return the command, quoted where a shell would redirect on `>`."""
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
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _requires(distribution: str) -> list[str]:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.requires(distribution) or []
    return []
