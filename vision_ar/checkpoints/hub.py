"""Models on the Hugging Face Hub: `hf:owner/name` is a model folder there, `hf:owner/name/file` a published file.

The prefix makes a download something that was asked for; a mistyped path is never looked up in a network.
"""

from __future__ import annotations

from pathlib import Path

PREFIX = "hf:"
OURS = ["config.yaml", "model.safetensors", "README.md"]


def fetch(source: str | Path) -> str | Path:
    """The local path of a model on the Hub; anything without the prefix comes back as it is.

    Raises:
        ValueError: when it cannot be fetched.
    """
    text = str(source)
    if not text.startswith(PREFIX):
        return source
    owner, _, rest = text.removeprefix(PREFIX).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name):
        raise ValueError(f"a model on the Hub must be {PREFIX}owner/name or {PREFIX}owner/name/file, got {text}")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    print(f"fetching {text} from the Hugging Face Hub")
    try:
        if file:
            return Path(hf_hub_download(f"{owner}/{name}", file))
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=OURS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = " ".join(str(error).split())[:160]
        raise ValueError(f"{text} must be on the Hub and reachable, got: {first}") from error


def push(folder: Path, repo: str) -> str:
    """Upload a model folder to owner/name, made if needed, and return its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repo = repo.removeprefix(PREFIX)
    if repo.count("/") != 1:
        raise ValueError(f"repo must be owner/name, got {repo}")
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=OURS))
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"{repo} must be writable for you, got: {' '.join(str(error).split())[:160]}") from error
