"""What a result was measured with: the code, the packages, the machine."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "numpy",
    "gymnasium",
    "mujoco",
    "ale-py",
    "stable-baselines3",
    "sb3-contrib",
    "transformers",
    "trl",
)


def git(*arguments: str) -> str | None:
    """What `git arguments...` prints in the repository; None where it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def available_cores() -> list[int]:
    """The cores that this process may use; all of them where the system cannot tell."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def installed_packages() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe() -> dict:
    """Code, packages, machine and time, as of now. `dirty`: a Python file differs from the commit."""
    import torch  # only here: the rest of the harness needs not wait for it

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--verify", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "*.py")),
        "python": platform.python_version(),
        "packages": installed_packages(),
        "processor": processor(),
        "cores": len(available_cores()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine(description: dict) -> str:
    """Processor, and GPU if there is one, of what `describe` returned."""
    return " with ".join(filter(None, (description["processor"], description["gpu"])))
