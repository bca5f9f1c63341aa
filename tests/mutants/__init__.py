"""Copies of Tacit with one condition of its security taken away each: the suite has to fail on every one of them."""

from mutants import network, protocol

MUTANTS = protocol.MUTANTS + network.MUTANTS
