"""Certificates for tests, made anew: an authority, a server's and a client's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import trustme


@dataclass
class Certificates:
    """An authority and what it signs, as PEM files in a folder."""

    folder: Path
    authority: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.authority.cert_pem.write_to_path(self.ca)

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def issue(self, stem: str, *identities: str, **fields: object) -> tuple[Path, Path]:
        """Certificate and key of a name, in files that replace older ones as a whole."""
        issued = self.authority.issue_cert(*identities, common_name=stem, **fields)
        certificate, key = self.folder / f"{stem}.pem", self.folder / f"{stem}.key"
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        for path, content in ((key, issued.private_key_pem.bytes()), (certificate, chain)):
            (new := path.with_suffix(".new")).write_bytes(content)
            new.replace(path)
        return certificate, key
