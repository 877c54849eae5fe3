"""Make the file tree of the metrics agent's image: Python, the agent, the libraries both need, and nothing else.

    python -m scripts.pulse_tree requirements              what the agent needs of requirements.lock, for pip
    python -m scripts.pulse_tree tree FOLDER               the tree, from the interpreter that runs this, its site-packages and src
    python -m scripts.pulse_tree debug FOLDER              what the debug image has besides: a busybox

Not a packager: no shell, no package manager, no compiler, no tests are in the tree, and it is only fit to run `kata-pulse`. Files keep
the places they have here. What they belong to is told the way image scanners look for it where there is no package manager: Debian's
packages by a file each in var/lib/dpkg/status.d with their copyright beside them, Python's by their dist-info. All times are 0, so that
equal sources make an equal tree. Python's files are compiled, since nobody can write to the tree where it runs.

Sources: ld.so(8), ldd(1), dpkg-query(1), Python's documentation of compileall and sysconfig.
"""

import argparse
import compileall
import importlib.metadata
import os
import py_compile
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parent.parent
DISTRIBUTIONS: Final = (
    *(
        "bcrypt",
        "cramjam",
        "google-re2",
        "grpcio",
        "httptools",
        "msgspec",
        "protobuf",
        "PyYAML",
        "typing_extensions",
        "uvloop",
        "zstandard",
    ),
)
"""What the agent imports, and what these import. Not all of isopod's: certificates are made by nodes, and gRPC is only asked here."""
PACKAGE_FOLDER: Final = Path("opt/isopod/lib")
LAUNCHER: Final = Path("usr/bin/kata-pulse")
TRIED: Final = (
    *(
        "bcrypt",
        "cramjam",
        "ctypes",
        "decimal",
        "google._upb._message",
        "grpc.aio",
        "httptools",
        "isopod._core",
        "isopod.node.pulse",
        "lzma",
    ),
    *("mmap", "msgspec._core", "re2", "ssl", "uvloop", "yaml._yaml", "zstandard"),
)
"""Imported once in the finished tree: stripping or leaving out must have broken none."""
KEPT_SUFFIXES: Final = (".py", ".so", ".pem", ".binpb")
LEFT_OUT_FOLDERS: Final = frozenset(
    (
        *("__pycache__", "test", "tests", "testdata", "testing", "idlelib", "lib2to3", "pydoc_data", "distutils", "ensurepip", "tkinter"),
        *("turtledemo", "unittest", "venv", "xmlrpc", "wsgiref", "curses", "sqlite3", "dbm", "dist-packages", "site-packages"),
    )
)
LEFT_OUT_MODULES: Final = re.compile(
    r"(_curses|_curses_panel|readline|_dbm|_gdbm|_sqlite3|_tkinter|nis|_crypt|ossaudiodev|_test\w*|_xxtestfuzz|xxlimited\w*|_codecs_\w+"
    r"|turtle|antigravity|this|_aix_support|_osx_support|_bootsubprocess|sitecustomize|_ctypes_test|_cffi)\.(py|cpython-.*\.so)"
)
"""Extension modules that would bring libraries along, and what no agent imports. zstandard has two backends and takes the other one."""
COPIED: Final = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/ssl/openssl.cnf"))
"""Files of the machine that go along where it has them: whom to trust, and how TLS is set."""
WRITTEN: Final = {
    "etc/passwd": "root:x:0:0:root:/:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
    "etc/os-release": 'ID=isopod-pulse\nNAME="isopod pulse"\nPRETTY_NAME="isopod pulse (files of Debian)"\n',
}
FOLDERS: Final = ("dev", "proc", "sys", "run/vc", "run/kata", "run/containerd", "run/isopod")
"""Where an engine mounts, also into a root that cannot be written."""
SEARCHED: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"
DEADLINE_S: Final = 120


class TreeError(Exception):
    """The tree cannot be made; the text says why."""


def main(arguments: Sequence[str]) -> int:
    """Do one of the three things.

    Args:
        arguments: As the header says.
    """
    parser = argparse.ArgumentParser(description="Make the file tree of the metrics agent's image.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("requirements")
    for verb in ("tree", "debug"):
        verbs.add_parser(verb).add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.verb == "requirements":
            print("\n".join(requirements()))
        else:
            (make_tree if given.verb == "tree" else make_debug)(given.folder)
    except (OSError, TreeError, importlib.metadata.PackageNotFoundError) as error:
        print(f"pulse_tree: {error}", file=sys.stderr)
        return 1
    return 0


def requirements() -> list[str]:
    """Return the lines of requirements.lock that the agent needs."""
    wanted = {_normal(name) for name in DISTRIBUTIONS}
    lines = (PROJECT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if _normal(line.partition("==")[0]) in wanted]
    if len(found) != len(wanted):
        raise TreeError("requirements.lock does not name all that the agent needs")
    return found


def make_tree(tree: Path) -> None:
    """Make the tree in an empty or absent folder.

    Raises:
        TreeError: Something that belongs into it is not here.
    """
    _make_root(tree)
    python = Path(sys.executable).resolve()
    _copy(python, tree)
    sources = [python, *_copy_python(Path(sysconfig.get_path("stdlib")), tree)]
    for name in DISTRIBUTIONS:
        _copy_distribution(name, tree / PACKAGE_FOLDER)
    _copy_agent(tree / PACKAGE_FOLDER / "isopod")
    _write(tree / LAUNCHER, _launcher(python), mode=0o755)
    _strip(tree)
    sources += [*_copy_libraries(tree, python), *_copy_settings(tree)]
    _record_packages(sources, tree)
    _compile(tree)
    _settle(tree)
    _try(tree, python)


def make_debug(tree: Path) -> None:
    """Make what the debug image has besides.

    Raises:
        TreeError: There is no busybox.
    """
    busybox = Path(shutil.which("busybox") or "/bin/busybox").resolve()
    if not busybox.exists():
        raise TreeError("busybox is not installed: apt-get install busybox-static")
    _copy(busybox, tree)
    folder = tree / busybox.parent.relative_to("/")
    for applet in _output(str(busybox), "--list").split():
        if not (folder / applet).exists():
            (folder / applet).symlink_to("busybox")
    _record_packages([busybox], tree)
    _settle(tree)


# --- Python and the agent ---------------------------------------------------------------------------------------------


def _make_root(tree: Path) -> None:
    tree.mkdir(parents=True, exist_ok=True)
    if any(tree.iterdir()):
        raise TreeError(f"{tree} is not empty")
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    for name in FOLDERS:
        (tree / name).mkdir(parents=True, exist_ok=True)
    (tree / "tmp").mkdir(mode=0o1777)
    for name, text in WRITTEN.items():
        _write(tree / name, text)


def _copy_python(stdlib: Path, tree: Path) -> list[Path]:
    """Copy the standard library, without what no agent imports; return which files."""
    found = [path for path in _files(stdlib) if path.suffix in KEPT_SUFFIXES and not LEFT_OUT_MODULES.fullmatch(path.name)]
    for path in found:
        _copy(path, tree)
    return found


def _copy_distribution(name: str, place: Path) -> None:
    """Copy what an installed package imports, and what says which it is and under which licence."""
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        is_information = file.parts[0].endswith(".dist-info")
        is_kept = file.name == "METADATA" or "licen" in str(file).lower() if is_information else file.suffix in KEPT_SUFFIXES
        if is_kept and ".." not in file.parts and not LEFT_OUT_FOLDERS & set(file.parts) and not LEFT_OUT_MODULES.fullmatch(file.name):
            _place(Path(str(file.locate())), place / file)


def _copy_agent(place: Path) -> None:
    package = PROJECT / "src" / "isopod"
    if not (package / "_core.abi3.so").exists() or not (package / "pulse" / "cri.binpb").exists():
        raise TreeError("the Rust core or the CRI's descriptors are not built: make setup")
    for source in _files(package):
        if source.suffix in KEPT_SUFFIXES:
            _place(source, place / source.relative_to(package))
    _place(PROJECT / "LICENSE", place / "LICENSE")


def _launcher(python: Path) -> str:
    """Return the program: an interpreter that looks nowhere but into the tree, whatever its environment says."""
    return (
        f"#!{python} -IS\nimport sys\nsys.path.insert(0, {f'/{PACKAGE_FOLDER}'!r})\n"
        'from isopod.cli.main import main\nsys.exit(main(["pulse", *sys.argv[1:]]))\n'
    )


# --- libraries, settings, records --------------------------------------------------------------------------------------


def _strip(tree: Path) -> None:
    """Take what only a debugger reads out of the extensions: wheels bring more of it than of code."""
    for path in tree.rglob("*.so"):
        path.chmod(0o755)
        _output("strip", "--strip-unneeded", str(path))


def _copy_libraries(tree: Path, python: Path) -> list[Path]:
    """Copy the libraries that the programs of the tree load; return where they are on this machine."""
    found: dict[str, None] = {}
    for line in _output("ldd", str(python), *sorted(str(path) for path in tree.rglob("*.so"))).splitlines():
        missing = re.search(r"(\S+) => not found", line)
        if missing:
            raise TreeError(f"no library {missing.group(1)}")
        match = re.search(r"(/\S+) \(0x", line)
        if match and not match.group(1).startswith(f"{tree.resolve()}/"):
            found[match.group(1)] = None
    for path in found:
        _copy(Path(path), tree)
    # Where libraries lie in folders that the loader does not know by itself, its list must name them.
    _write(tree / "etc/ld.so.conf", "".join(f"{folder}\n" for folder in sorted({str(Path(path).parent.resolve()) for path in found})))
    _output("ldconfig", "-r", str(tree))
    return [Path(path) for path in found]


def _copy_settings(tree: Path) -> list[Path]:
    """Copy what of the machine's settings goes along; return which files."""
    found = [path for path in COPIED if path.exists()]
    for path in found:
        _copy(path, tree)
    default = tree / Path(ssl.get_default_verify_paths().openssl_cafile).relative_to("/")
    if COPIED[0] in found and not default.exists():
        default.parent.mkdir(parents=True, exist_ok=True)
        default.symlink_to(COPIED[0])
    return found


def _record_packages(files: Iterable[Path], tree: Path) -> None:
    """Write down which of Debian's packages files are of, and copy under which terms. On another system there is nothing to say."""
    if shutil.which("dpkg-query") is None:
        return
    for name in _owners(files):
        bare = name.partition(":")[0]
        _write(tree / "var/lib/dpkg/status.d" / bare, _output("dpkg-query", "--status", name))
        terms = Path("/usr/share/doc") / bare / "copyright"
        if terms.exists():
            _copy(terms, tree)


def _owners(files: Iterable[Path]) -> list[str]:
    """Return the packages that files belong to. They know a file by its place from before or after /usr took it in."""
    places = {str(file): None for file in files}
    places |= {f"{Path(place).parent.resolve()}/{Path(place).name}": None for place in places}
    places |= {place.removeprefix("/usr"): None for place in places}
    # It fails if nobody owns one of them, and tells of the others all the same.
    done = subprocess.run(["dpkg-query", "--search", *places], capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    names = (line.rpartition(": ")[0].split(", ") for line in done.stdout.splitlines() if not line.startswith("diversion "))
    return sorted({name for some in names for name in some})


# --- the whole tree ----------------------------------------------------------------------------------------------------


def _compile(tree: Path) -> None:
    """Compile Python's files, to be taken as they are: without a look at the source, whose times say nothing."""
    done = compileall.compile_dir(
        tree, quiet=1, maxlevels=30, stripdir=str(tree), prependdir="/", invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    if not done:
        raise TreeError("a file of Python does not compile")


def _settle(tree: Path) -> None:
    """Give everything to root, readable by all, of the time 0."""
    for path in (*tree.rglob("*"), tree):
        if not path.is_symlink():
            path.chmod(0o1777 if path == tree / "tmp" else 0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        if os.geteuid() == 0:
            os.chown(path, 0, 0, follow_symlinks=False)
        os.utime(path, (0, 0), follow_symlinks=False)


def _try(tree: Path, python: Path) -> None:
    """Import every extension in the tree alone; who is not root cannot, and leaves it to the first start."""
    if os.geteuid() == 0:
        code = f"import sys; sys.path.insert(0, '/{PACKAGE_FOLDER}'); import {', '.join(TRIED)}"
        _output("chroot", str(tree), str(python), "-IS", "-c", code)


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT_FOLDERS and not name.startswith("config-"))
        yield from (Path(parent) / name for name in sorted(names))


def _copy(source: Path, tree: Path) -> None:
    """Copy a file to its own place in the tree, past the links of the folders on the way (/lib is /usr/lib)."""
    _place(source, tree / source.parent.resolve().relative_to("/") / source.name)


def _place(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place)
    place.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def _write(place: Path, text: str, *, mode: int = 0o644) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
    place.chmod(mode)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _output(*argv: str) -> str:
    environment = {"PATH": SEARCHED, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    if done.returncode != 0:
        raise TreeError(f"{' '.join(argv[:3])}: {done.stderr.strip()[-500:] or done.stdout.strip()[-500:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
