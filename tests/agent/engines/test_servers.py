"""How the servers of the http engine are named."""

import pytest

from agent.engines import check_engine
from agent.engines.servers import parse_servers
from trajectory.errors import InputError


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("http", "names no server: give --engine http:URL"),
        ("http:", "names no server"),
        ("http:,", "names no server"),
        ("http:127.0.0.1:8000", "neither a URL nor a file"),
        ("http:http://", "is not the URL of a server"),
        ("http:http://a:99999", "is no URL"),
        ("http:http://a:0", "is not the URL of a server"),
        ("http:http://a,http://A/v1/", "names the server http://a twice"),
        ("http:http://me:pw@a", "must hold no name, password or query"),
        ("http:http://a?key=1", "must hold no name, password or query"),
        ("http:http://a,patience=-1", "patience must be seconds above 0"),
        ("http:http://a,timeout=nan", "timeout must be seconds above 0"),
        ("transformers:x", "takes nothing after its name"),
        ("https:x", "unknown engine"),
    ],
)
def test_bad_names_are_refused(name, reason):
    with pytest.raises(InputError, match=reason) as caught:
        check_engine(name)
    assert "pw" not in str(caught.value)


def test_servers_can_be_listed_in_a_file(tmp_path):
    path = tmp_path / "servers.txt"
    path.write_text("# rack 1\nhttp://a:1\n\nhttps://b/x/v1/  # spare\n")
    found = parse_servers(f"{path}, http://c,patience=7,timeout=9")
    assert found.urls == ("http://a:1", "https://b/x", "http://c")
    assert (found.patience_s, found.timeout_s) == (7, 9)
