"""Flakes that need nothing from the network, and Nix with a store of its own to build them.

`RUNNER` implements the contract of microvm.nix's runners by a shell script; `microvm_flake` stands in for github:astro/microvm.nix and its
nixpkgs, as far as a wrapped module sees them.
"""

import os
import shutil
from typing import Final

import pytest

from isopod.engine.vm.drivers.nix import NixDriver, NixDriverSettings
from isopod.engine.vm.drivers.nix_build import NixSettings
from isopod.engine.vm.machine import MachineSpec
from isopod.world.world import World

CONF: Final = """\
sandbox = false
substituters =
build-users-group =
flake-registry =
"""
RUN: Final = """\
#!/bin/bash
echo "$0 runs in $PWD"
exec -a microvm@vm1 sleep 300
"""
SHUTDOWN: Final = """\
#!/bin/bash
echo "$MAINPID" > shutdown.txt
kill -TERM "$MAINPID"
"""


def need_nix() -> None:
    """Skip a test where there is no Nix."""
    if shutil.which("nix") is None:
        pytest.skip("needs nix (apt-get install nix-bin)")


def nix_settings(folder: str, *, timeout_s: float = 60.0) -> NixSettings:
    """Return settings for a store of its own below a folder."""
    os.makedirs(f"{folder}/nix/conf", exist_ok=True)
    os.makedirs(f"{folder}/nix/home", exist_ok=True)
    with open(f"{folder}/nix/conf/nix.conf", "w", encoding="utf-8") as file:
        file.write(CONF)
    env = {f"NIX_{name.upper()}_DIR": f"{folder}/nix/{name}" for name in ("store", "state", "log", "conf")}
    return NixSettings(home=f"{folder}/nix/home", env=env, timeout_s=timeout_s, offline=True)


def nix_driver(
    world: World, folder: str, *, microvm: str = "github:astro/microvm.nix", bridge: str = "", timeout_s: float = 60.0
) -> NixDriver:
    """Return a driver with its state and its store below a folder."""
    settings = NixDriverSettings(f"{folder}/microvms", bridge=bridge, microvm=microvm, nix=nix_settings(folder, timeout_s=timeout_s))
    return NixDriver(world, settings, find_pid=pid_in_bundle)


async def pid_in_bundle(world: World, spec: MachineSpec) -> int | None:
    """Return the pid that a test wrote into the machine's folder."""
    try:
        return int(await world.disk.read(f"{spec.folder}/pid"))
    except FileNotFoundError:
        return None


def derivation(name: str, script: str, **files: str) -> str:
    """Return a Nix expression of a thing that a shell script makes in $out.

    Args:
        name: Of the thing.
        script: The script; `files` are at their names' variables: "$runPath".
        files: Texts.
    """
    texts = "".join(f"      {key} = ''{_quoted(text)}'';\n" for key, text in files.items())
    passed = " ".join(f'"{key}"' for key in files)
    return f"""derivation {{
      name = "{name}"; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
{texts}      passAsFile = [ "script" {passed} ];
      script = ''{_quoted(script)}'';
      args = [ "-c" ". \\"$scriptPath\\"" ];
    }}"""


def runner(name: str = "microvm-qemu-vm1", *, run: str = RUN, shutdown: str = SHUTDOWN, extra: str = "") -> str:
    """Return a Nix expression of a runner."""
    script = f"""
set -e
echo "making $name" >&2
mkdir -p $out/bin $out/share/microvm
cp "$runPath" $out/bin/microvm-run
cp "$shutdownPath" $out/bin/microvm-shutdown
chmod +x $out/bin/*
{extra}
"""
    return derivation(name, script, run=run, shutdown=shutdown)


def write_flake(folder: str, machines: dict[str, str]) -> str:
    """Write a flake with these machines' runners and return its folder."""
    os.makedirs(folder, exist_ok=True)
    lines = "".join(f'    nixosConfigurations."{name}".config.microvm.declaredRunner = {text};\n' for name, text in machines.items())
    with open(f"{folder}/flake.nix", "w", encoding="utf-8") as file:
        file.write("{ outputs = { self }: {\n" + lines + "  };\n}\n")
    return folder


def microvm_flake(folder: str) -> str:
    """Write flakes that stand in for microvm.nix and nixpkgs, and return the reference of the first."""
    os.makedirs(f"{folder}/nixpkgs", exist_ok=True)
    os.makedirs(f"{folder}/microvm", exist_ok=True)
    with open(f"{folder}/nixpkgs/flake.nix", "w", encoding="utf-8") as file:
        file.write(_NIXPKGS)
    with open(f"{folder}/microvm/flake.nix", "w", encoding="utf-8") as file:
        made = runner("microvm-${config.microvm.hypervisor}-${config.networking.hostName}")
        file.write(_MICROVM.replace("NIXPKGS", f"path:{folder}/nixpkgs").replace("RUNNER", made))
    return f"path:{folder}/microvm"


_NIXPKGS: Final = """\
{ outputs = { self }: { lib = rec {
    mkDefault = value: value;
    nixosSystem = { system, modules }:
      let
        read = module: if builtins.isFunction module then module { inherit config; lib = { inherit mkDefault; }; }
          else if builtins.isAttrs module then module else read (import module);
        join = a: b: a // builtins.mapAttrs (key: value:
          if a ? ${key} && builtins.isAttrs value && builtins.isAttrs a.${key} && !(value ? type) then a.${key} // value else value) b;
        config = builtins.foldl' join {} (map read modules);
      in { inherit config; };
  }; };
}
"""
_MICROVM: Final = """\
{ inputs.nixpkgs.url = "NIXPKGS";
  outputs = { self, nixpkgs }: { nixosModules.microvm = { config, ... }: { microvm.declaredRunner = RUNNER; }; };
}
"""


def _quoted(text: str) -> str:
    return text.replace("''", "'''").replace("${", "''${")
