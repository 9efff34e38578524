"""The bundle: its manifest, reading it without trusting it, writing it whole or not at all."""

from .reader import Bundle as Bundle
