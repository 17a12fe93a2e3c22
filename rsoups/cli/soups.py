"""Commands: interpolate, inspect, convert, merge."""

from __future__ import annotations

import argparse

from rsoups.common.errors import AdapterError

BASE = "folder or Hub id of the base, for what only it can tell: whole parameters that some lack, old names of layers"


def interpolate(args: argparse.Namespace) -> None:
    from rsoups.soups.interpolation import interpolate
    from rsoups.soups.soup import Soup

    soup = interpolate(
        args.adapters,
        args.lambdas,
        method=args.method,
        rank=args.rank,
        normalize=args.normalize,
        extrapolate=args.extrapolate,
        allow_base_mismatch=args.allow_base_mismatch,
        base=args.base,
    )
    assert isinstance(soup, Soup)
    soup.save_pretrained(args.out)
    print(args.out)


def rank(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def inspect(args: argparse.Namespace) -> None:
    from rsoups.adapters.adapter import read_adapter
    from rsoups.fronts.front import Front
    from rsoups.versions.inspect import inspect_adapters

    adapters = {source: read_adapter(source) for source in args.adapters}
    found = inspect_adapters(adapters, args.base, allow_base_mismatch=args.allow_base_mismatch)
    print(found.to_text())
    for conflict in found.conflicts(Front.from_jsonl(args.records) if args.records else None):
        print(f"conflict: {conflict}")


def convert(args: argparse.Namespace) -> None:
    from rsoups.adapters.convert import convert

    convert(args.source, args.out)


def merge(args: argparse.Namespace) -> None:
    import torch

    from rsoups.soups.interpolation import interpolate
    from rsoups.soups.soup import Soup

    soup = interpolate([args.adapter], [1.0])
    assert isinstance(soup, Soup)
    base = args.base or soup.config.base_model_name_or_path
    if not base:
        raise AdapterError(f"{args.adapter} does not name its base: say --base")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    soup.merge(base, args.out, dtype, allow_base_mismatch=args.allow_base_mismatch)
    print(args.out)
