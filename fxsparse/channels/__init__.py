"""Channels: what can be removed together, and the smaller graph without it."""

from .analysis import channel_groups
from .channel_groups import ChannelGroups
from .compact_module import CompactModule
from .compaction import compact

__all__ = ["ChannelGroups", "CompactModule", "channel_groups", "compact"]
