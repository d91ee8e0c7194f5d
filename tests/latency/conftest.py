import os
from pathlib import Path

import platformdirs
import pytest


@pytest.fixture(scope="session")
def peer_python():
    """The Python of the peer, as ci/bench-peer.sh installs it; None where nobody ran that."""
    default = platformdirs.user_cache_path("mobile-export") / "peers" / "llama.cpp" / "bin" / "python"
    path = Path(os.environ.get("MOBILE_EXPORT_PEER_PYTHON", default))
    return path if path.is_file() else None
