"""Every target by name; the folders of the corpus have these names."""

from __future__ import annotations

from .file_targets import GGUF, SAFETENSORS
from .handle_targets import FRAMES, MANIFEST, REPLIES
from .kept_targets import ROOT_LOG, ROOT_ROWS, SETTINGS
from .loader_targets import LOADER_HEARS, LOADER_SAYS
from .peer_targets import FLEET_MANIFEST, PEER_ANSWERS, PEER_REQUESTS
from .target import Target

TARGETS: dict[str, Target] = {
    "fleet_manifest": FLEET_MANIFEST,
    "frames": FRAMES,
    "gguf": GGUF,
    "loader_hears": LOADER_HEARS,
    "loader_says": LOADER_SAYS,
    "manifest": MANIFEST,
    "peer_answers": PEER_ANSWERS,
    "peer_requests": PEER_REQUESTS,
    "replies": REPLIES,
    "root_log": ROOT_LOG,
    "root_rows": ROOT_ROWS,
    "safetensors": SAFETENSORS,
    "settings": SETTINGS,
}
