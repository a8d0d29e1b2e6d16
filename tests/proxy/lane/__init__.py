"""Tests of the lane: plain HTTP/1.1 without the layers of mitmproxy."""
