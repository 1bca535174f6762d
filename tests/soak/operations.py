"""What a client of a soak does, and how it compares all that it is given with what was written."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import time
import traceback
from pathlib import Path

import xxhash

import weightd
from soak.plan import Plan
from soak.versions import MARK, VersionReader, mark_of
from support.content import content
from weightd.composing import SEALS, ComposedTensor, TensorSource
from weightd.types import TensorKey

OPERATIONS = {
    "attach_path": 30,
    "attach_name": 25,
    "attach_pipeline": 12,
    "compare_again": 25,
    "load": 12,
    "load_detached": 3,
    "load_memory": 2,
    "compose": 4,
    "remove": 3,
    "pin": 3,
    "verify": 1,
    "fork": 5,
    "scribble": 4,
    "drop": 20,
    "look": 4,
    "reconnect": 2,
}
"""How often a client does what, one against the other. Each returns how many bytes it compared."""
NAMES = tuple(f"n{number}" for number in range(7))
PIPELINE_NAMES = ("p0", "p1")
PIPELINE_FILE = "diffusion_pytorch_model.safetensors"
COMPONENTS = ("unet", "vae")
_MOST_HELD = 6
_FORKED_SECONDS = 30


class Operations:
    """One client's, with the attachments that it holds."""

    def __init__(self, plan: Plan, client: weightd.Client, chance: random.Random) -> None:
        self.plan, self.client, self._chance = plan, client, chance
        self._versions = VersionReader(plan.register)
        self._held: list[tuple[weightd.Attachment, str]] = []

    # -- what the soak is about --------------------------------------------------------------------------------------

    def compare(self, attachment: weightd.Attachment, how: str) -> int:
        """Read every attached byte: has each tensor the digest that the manifest says, and are all of one version?

        Returns the number of bytes.
        """
        compared = 0
        for component in sorted({key.component for key in attachment.tensors}):
            mark = content(attachment, MARK, component)
            versions = self._versions.versions(mark)
            where = {"how": how, "content": attachment.content_digest, "mark": mark.decode(errors="replace")}
            if not versions:
                self.plan.find("content that was never written", **where)
                continue
            for info in [one for one in attachment.tensors.values() if one.component == component]:
                data = content(attachment, info.name, component)
                compared += len(data)
                digest = xxhash.xxh3_128_digest(data)
                same = [version for version in versions if version.get(info.name) == digest.hex()]
                if digest != info.digest or not same:
                    self.plan.find("WRONG BYTES", **where, tensor=info.name, length=len(data), got=digest.hex(),
                                    manifest=info.digest.hex(), version=versions[0].get(info.name))  # fmt: skip
                versions = same or versions
        return compared

    def attach_path(self) -> int:
        """A file, whole or in part: the version that stood there before and after is the one that comes."""
        path = self._file()
        before = mark_of(path)
        attachment = self.client.attach(path, tensors=self._some_tensors())
        self._compare_marks("", before, mark_of(path), attachment)
        return self._keep(attachment, "path")

    def attach_pipeline(self) -> int:
        """A pipeline by its folder or its name: whole, one component, or some tensors of one."""
        keys = [(COMPONENTS[1], MARK), (COMPONENTS[1], "layer0")]
        part = self._chance.choice([{}, {"components": ["unet"]}, {"components": ["vae"]}, {"tensors": keys}])
        if self._chance.random() < 0.4:
            return self._keep(self.client.attach(self._chance.choice(PIPELINE_NAMES), **part), "pipeline's name")  # type: ignore[arg-type]  # keywords of attach
        folder = Path(self._chance.choice(self.plan.pipelines))
        before = [mark_of(folder / component / PIPELINE_FILE) for component in COMPONENTS]
        attachment = self.client.attach(folder, **part)  # type: ignore[arg-type]  # keywords of attach
        after = [mark_of(folder / component / PIPELINE_FILE) for component in COMPONENTS]
        for component, first, second in zip(COMPONENTS, before, after, strict=True):
            self._compare_marks(component, first, second, attachment)
        return self._keep(attachment, "pipeline's folder")

    def attach_name(self) -> int:
        return self._keep(self.client.attach(self._name(), tensors=self._some_tensors()), "name")

    def compare_again(self) -> int:
        """Has anything changed of what is held, whatever happened to the daemon since?"""
        if not self._held:
            return 0
        attachment, how = self._chance.choice(self._held)
        return self.compare(attachment, f"{how}, again")

    # -- what happens beside it --------------------------------------------------------------------------------------

    def load(self) -> int:
        """Under a name or not, some pinned, some verified; half of them are attached by digest."""
        if self._chance.random() < 0.25:
            path, name = Path(self._chance.choice(self.plan.pipelines)), self._chance.choice(PIPELINE_NAMES)
        else:
            path, name = self._file(), self._name()
        loaded = self.client.load(
            path,
            name=name if self._chance.random() < 0.7 else None,
            pin=self._chance.random() < 0.08,
            verify=self._chance.random() < 0.15,
        )
        if self._chance.random() < 0.5:
            return 0
        return self._keep(self.client.attach(loaded.content_digest), "digest")

    def load_detached(self) -> int:
        self.client.load_report(self._file(), detached=True)
        return 0

    def load_memory(self) -> int:
        """What stands in a file, out of a sealed memfd, unless the file was written to meanwhile."""
        path = self._file()
        before, data = mark_of(path), path.read_bytes()
        if before is None or mark_of(path) != before:
            return 0
        descriptor = os.memfd_create("soak", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(descriptor, data)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            loaded = self.client.load_memory(descriptor)
        finally:
            os.close(descriptor)
        assert loaded is not None  # not detached
        return self._keep(self.client.attach(loaded.content_digest), "memory")

    def compose(self) -> int:
        """Half of the tensors of something held, as a checkpoint of its own."""
        if not self._held:
            return 0
        source, _ = self._chance.choice(self._held)
        wanted = [
            ComposedTensor(info.file, info.name, info.dtype, info.shape, TensorSource(source.content_digest, *key))
            for key, info in source.tensors.items()
            if info.length and (info.name == MARK or self._chance.random() < 0.5)
        ]
        composed = self.client.compose(source.files, wanted)
        return self._keep(self.client.attach(composed.content_digest), "composed")

    def remove(self) -> int:
        self.client.remove(self._chance.choice([*NAMES, *PIPELINE_NAMES, *self.plan.files]))
        return 0

    def pin(self) -> int:
        """More is unpinned than pinned, or nothing could be evicted any more."""
        name = self._name()
        if self._chance.random() < 0.35:
            self.client.pin(name)
        for checkpoint in self.client.checkpoints():
            if checkpoint.pinned and self._chance.random() < 0.5:
                self.client.unpin(checkpoint.content_digest)
        return 0

    def verify(self) -> int:
        self.client.verify(self._name() if self._chance.random() < 0.7 else None)
        return 0

    def look(self) -> int:
        """Everything that a client can ask."""
        self.client.checkpoints()
        self.client.names()
        self.client.leases()
        self.client.stats()
        self.client.device_map()
        self.client.sharing()
        self.client.loads()
        list(self.client.events())
        self.client.inspect(self._name())
        return 0

    def reconnect(self) -> int:
        self.client.close()
        self.client = weightd.connect(self.plan.socket, timeout=20.0, fallback="wait")
        return 0

    def scribble(self) -> int:
        """Write into a private mapping: nobody else may see it."""
        if self._held:
            attachment, _ = self._held.pop()
            for key, info in list(attachment.tensors.items())[:4]:
                if info.length:
                    attachment.buffer(key.name, key.component)[:] = b"\xaa" * info.length  # type: ignore[index]  # host memory
            attachment.close()
        return 0

    def drop(self) -> int:
        if self._held:
            attachment, _ = self._held.pop(self._chance.randrange(len(self._held)))
            attachment.close()
        return 0

    def fork(self) -> int:
        """Let a child go on with all that is held, which the parent gives up."""
        if self._held and os.fork() == 0:
            self._live_on()
        self.close_held()
        return 0

    def close(self) -> None:
        self.close_held()
        self.client.close()

    def close_held(self) -> None:
        for attachment, _ in self._held:
            attachment.close()
        self._held.clear()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _live_on(self) -> None:
        """Be the child: compare now and then, and end, some by force."""
        try:
            signal.alarm(_FORKED_SECONDS)
            for _ in range(self._chance.randint(1, 4)):
                time.sleep(self._chance.uniform(0, 1.5))
                began = time.monotonic()
                compared = sum(self.compare(attachment, f"{how}, forked") for attachment, how in self._held)
                self.plan.record("forked", None, compared, time.monotonic() - began)
            if self._chance.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
        except BaseException:  # noqa: BLE001  # a finding, whatever it is
            self.plan.find("a forked child failed", error=traceback.format_exc()[-2000:])
        finally:
            os._exit(0)

    def _compare_marks(
        self, component: str, before: bytes | None, after: bytes | None, attachment: weightd.Attachment
    ) -> None:
        if before is None or before != after or TensorKey(component, MARK) not in attachment.tensors:
            return
        got = content(attachment, MARK, component)
        if got != before:
            self.plan.find("another version than the file's", got=got.decode(errors="replace"), file=before.decode())

    def _keep(self, attachment: weightd.Attachment, how: str) -> int:
        """Compare; hold most, and give the rest up."""
        compared = self.compare(attachment, how)
        if len(self._held) == _MOST_HELD:
            self.drop()
        if self._chance.random() < 0.75:
            self._held.append((attachment, how))
        else:
            attachment.close()
        return compared

    def _file(self) -> Path:
        return Path(self._chance.choice(self.plan.files))

    def _name(self) -> str:
        return self._chance.choice(NAMES)

    def _some_tensors(self) -> list[str]:
        return self._chance.choice([[], [], [MARK, "layer0"], [MARK, "small0", "layer1", "layer2"]])
