"""Which files are found and in which order, on both Worlds and over plain calls."""

import pytest

from isopod.runtime.config import ConfigLoader, RuntimeConfig, drop_in_folder, run_search
from isopod.runtime.config.files import DROP_INS_MAX, search
from isopod.world.errors import InvalidArgument, UsageError
from isopod.world.world import World


@pytest.mark.row("S23")
async def test_search_path_and_drop_ins(world: World, folder: str) -> None:
    disk = world.disk
    loader = ConfigLoader(RuntimeConfig)
    loader.add_search_path(f"{folder}/a")
    loader.add_search_path(f"{folder}/b")
    loader.add_file_name("app")
    assert (await loader.read(disk)).config == RuntimeConfig()
    await disk.make_directory(f"{folder}/b")
    await disk.write(f"{folder}/b/app.json", b'{"smp": {"num_shards": 1}}')
    assert (await loader.read(disk)).config.smp.num_shards == 1
    await disk.make_directory(f"{folder}/a/config.d")
    await disk.write(f"{folder}/a/config.yml", b"smp: {num_shards: 2, message_queue_size: 5}")
    await disk.write(f"{folder}/a/config.d/20-late.toml", b"[smp]\nnum_shards = 4\n")
    await disk.write(f"{folder}/a/config.d/10-early.yaml", b"smp: {num_shards: 3}\napp: {name: x}\n")
    await disk.write(f"{folder}/a/config.d/README.md", b"not looked at")
    await disk.write(f"{folder}/a/config.d/.hidden.toml", b"= not looked at")
    loaded = await loader.read(disk, environment={"ISOPOD_APP_VERSION": "9"})
    assert (loaded.config.smp.num_shards, loaded.config.smp.message_queue_size, loaded.config.app.name) == (4, 5, "x")
    assert loaded.files == tuple(f"{folder}/a/{name}" for name in ("config.yml", "config.d/10-early.yaml", "config.d/20-late.toml"))
    assert str(loaded.origin("app.name")) == f"drop-in {folder}/a/config.d/10-early.yaml"
    await disk.write(f"{folder}/a/config.toml", b"\xef\xbb\xbf[smp]\nnum_shards = 7\n")
    assert (await loader.read(disk)).files[0] == f"{folder}/a/config.toml"


async def test_a_named_file_must_exist_and_be_text(world: World, folder: str) -> None:
    loader = ConfigLoader(RuntimeConfig)
    with pytest.raises(InvalidArgument, match="no such file"):
        await loader.read(world.disk, f"{folder}/none.toml")
    await world.disk.write(f"{folder}/latin.toml", b"name = '\xff'")
    with pytest.raises(UsageError, match="cannot read config file .*latin.toml"):
        await loader.read(world.disk, f"{folder}/latin.toml")
    await world.disk.write(f"{folder}/big.toml", b"#" * ((1 << 20) + 1))
    with pytest.raises(UsageError, match="cannot read config file .*big.toml"):
        await loader.read(world.disk, f"{folder}/big.toml")
    await world.disk.write(f"{folder}/good.toml", b"")
    await world.disk.write(f"{folder}/good.d", b"no folder of drop-ins")
    assert (await loader.read(world.disk, f"{folder}/good.toml")).files == (f"{folder}/good.toml",)
    await world.disk.make_directory(f"{folder}/folder.toml")
    with pytest.raises(UsageError, match="cannot read config file .*folder.toml"):
        await loader.read(world.disk, f"{folder}/folder.toml")


def test_drop_ins_without_a_file_and_too_many_of_them() -> None:
    files = {"/etc/x/config.d/a.toml": b"a = 1"}
    found = run_search(
        search("", folders=["/etc/x"], names=["config"]), files.get, lambda folder: ["a.toml"] if folder == "/etc/x/config.d" else []
    )
    assert [(file.path, file.layer) for file in found] == [("/etc/x/config.d/a.toml", "drop-in")]
    with pytest.raises(InvalidArgument, match="more than 256"):
        run_search(search("", folders=["/etc/x"], names=["config"]), files.get, lambda _: [f"{i}.toml" for i in range(DROP_INS_MAX + 1)])

    def broken(path: str) -> bytes | None:
        raise PermissionError(13, "Permission denied", path)

    with pytest.raises(UsageError, match="cannot read config file /c.toml: Permission denied"):
        run_search(search("/c.toml"), broken, lambda _: [])
    assert drop_in_folder("/etc/isopod/config.toml") == "/etc/isopod/config.d"
    assert drop_in_folder("/etc/isopod/config") == "/etc/isopod/config.d"


async def test_files_that_settings_name_must_be_there(world: World, folder: str) -> None:
    loader = ConfigLoader(RuntimeConfig)
    environment = {"SEASTAR_TLS_CERT_FILE": f"{folder}/cert.pem", "ISOPOD_TLS_KEY_FILE": f"{folder}/key.pem"}
    await world.disk.write(f"{folder}/cert.pem", b"")
    loaded = loader.load(environment=environment)
    with pytest.raises(InvalidArgument, match="ISOPOD_TLS_KEY_FILE '.*key.pem': no such file"):
        await loader.check_files(loaded, world.disk)
    await world.disk.write(f"{folder}/key.pem", b"")
    await loader.check_files(loaded, world.disk)
    await loader.check_files(loader.load(), world.disk)
