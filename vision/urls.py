"""The one parser of picture URLs: that of the client which dials, so that no two parsers can disagree about a host."""

from yarl import URL

from vision.image import MediaError

MAX_URL_CHARACTERS = 8 << 10  # as written, and as it is asked for; servers and proxies take no longer ones


def parse_url(url: str) -> URL:
    """An http, https or file URL. Raises MediaError url_invalid."""
    _check_length(url)
    if "\\" in url or any(ord(letter) < 0x20 or letter == "\x7f" for letter in url):
        raise MediaError("url_invalid", "the picture's URL holds a backslash or a control character")
    try:
        parsed = _as_written(url)
        is_valid = parsed.port != 0 and "\0" not in parsed.path and (parsed.scheme == "file" or bool(parsed.raw_host))
    except ValueError:
        is_valid = False
    if not is_valid:
        raise MediaError("url_invalid", "the picture's URL is not valid")
    _check_length(str(parsed))
    return parsed


def redirected(url: URL, location: str) -> URL:
    """Where a redirect from `url` leads. Raises MediaError."""
    _check_length(location)
    try:
        target = str(url.join(_as_written(location)))
    except ValueError:
        raise MediaError("image_fetch_failed", "the picture's server redirects to an invalid URL") from None
    if not target.startswith(("http://", "https://")):
        raise MediaError("url_blocked", "the picture's server redirects to something that is not http or https")
    return parse_url(target)


def _check_length(url: str) -> None:
    """Comes before all that looks at each letter, and before yarl, which keeps what it parsed."""
    if len(url) > MAX_URL_CHARACTERS:
        message = f"the picture's URL, or one that it redirects to, has more than the allowed {MAX_URL_CHARACTERS} characters"
        raise MediaError("url_invalid", message)


def _as_written(url: str) -> URL:
    """Without quoting anew what was signed as it is, unless it holds letters that no URL can."""
    return URL(url, encoded=url.isascii() and " " not in url)
