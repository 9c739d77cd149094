"""Print the part of Python's standard library that `make data` trains on, as a Hydra list.

Modules and a few packages of ordinary code; tests, generated tables and encodings are left out.
"""

import sysconfig

PACKAGES = [
    "asyncio", "concurrent", "email", "html", "http", "importlib", "json", "logging",
    "multiprocessing", "unittest", "urllib", "xml",
]  # fmt: skip


def sources() -> list[str]:
    """Globs and folders."""
    root = sysconfig.get_paths()["stdlib"]
    return [f"{root}/*.py", *(f"{root}/{package}" for package in PACKAGES)]


def main() -> None:
    """Entry point."""
    print(",".join(sources()))


if __name__ == "__main__":
    main()
