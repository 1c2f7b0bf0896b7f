"""Names on the Hugging Face hub."""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, OWNER/NAME, and not that of a path; whether it exists is not asked."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
