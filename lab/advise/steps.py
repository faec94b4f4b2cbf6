"""What a person has to do for a setting: in the guest, at the VMM, and what it does to the host's huge pages."""

from __future__ import annotations

from common.geometry import PAGEBLOCK_ORDER
from lab.advise.grid import DEFAULT, MAINLINE, Setting
from lab.advise.measure import Row

__all__ = ["how_to_set", "how_to_set_order"]

_PARAMETER = "page_reporting.page_reporting_order"
_SYSFS = "/sys/module/page_reporting/parameters/page_reporting_order"
# What switches the balloon's free page reporting on, without which a guest reports to nobody.
_VMMS = (
    ("QEMU", "`-device virtio-balloon-pci,free-page-reporting=on`"),
    ("libvirt", "`<memballoon model='virtio' freePageReporting='on'/>`"),
    ("Firecracker from 1.14 on", '`"free_page_reporting": true` in `PUT /balloon`'),
    ("Cloud Hypervisor", "`--balloon size=0,free_page_reporting=on`"),
)


def how_to_set(setting: Setting, row: Row) -> list[str]:
    """What to do for a setting, a line each."""
    lines = _other_policy(setting) if setting.policy != MAINLINE else _mainline(setting)
    lines.append(
        "The VMM has to offer it, or the guest reports to nobody: "
        + "; ".join(f"{name} {flag}" for name, flag in _VMMS)
        + ". None of them has a flag for order, delay or capacity: those are the guest's."
    )
    if setting.min_order < PAGEBLOCK_ORDER:
        lines.append(
            f"Below order {PAGEBLOCK_ORDER} the host gets back parts of its 2 MiB pages: each such part splits the "
            f"huge page that backs it (here {row.split_huge_pages} of them), which the host's khugepaged has to put "
            "together again; until then the guest's TLB misses cost more, which is not in these figures. Memory from "
            "hugetlbfs cannot be given back in such parts at all."
        )
    else:
        lines.append(
            f"From order {PAGEBLOCK_ORDER} on only whole 2 MiB pages go back: the host's huge pages stay whole."
        )
    return lines


def _other_policy(setting: Setting) -> list[str]:
    return [
        (
            f"The policy `{setting.policy}` is not in mainline, which has `{MAINLINE}`: it takes a kernel of your own "
            f"with that series. Order {setting.min_order}, delay {setting.delay_ns / 1e9:g} s and {setting.capacity} "
            "blocks a report are compile-time constants there, the order too."
        )
    ]


def how_to_set_order(order: int) -> str:
    """Where mainline takes its order from."""
    if order == DEFAULT.min_order:
        return (
            f"Order {order} is the default with pages of 4 KiB: nothing to do where `cat {_SYSFS}` in the guest says "
            f"so (`{_PARAMETER}` on its kernel command line)."
        )
    return (
        f"Order {order}: `{_PARAMETER}={order}` on the guest's kernel command line, or at run time "
        f"`echo {order} > {_SYSFS}`. Linux 6.1 overwrites the former as the balloon's driver registers: read it back, "
        "and where it is 9 again, set it at run time after that."
    )


def _mainline(setting: Setting) -> list[str]:
    lines = [how_to_set_order(setting.min_order)]
    changed = [
        f"PAGE_REPORTING_{name} from {before} to {now}"
        for name, before, now in (
            ("DELAY", "2 * HZ", _delay(setting.delay_ns)),
            ("CAPACITY", str(DEFAULT.capacity), str(setting.capacity)),
        )
        if now != before
    ]
    if changed:
        lines.append(
            "Delay and capacity are compile-time constants in mainline, with no parameter: change "
            f"{' and '.join(changed)} and rebuild the guest's kernel."
            + (
                " The host's reporting queue has to take that many blocks, too."
                if setting.capacity > DEFAULT.capacity
                else ""
            )
        )
    else:
        lines.append("Delay and capacity are those of mainline, where they are compile-time constants: nothing to do.")
    return lines


def _delay(delay_ns: int) -> str:
    """As the kernel's source would have it."""
    if delay_ns and delay_ns % 10**9 == 0:
        return f"{delay_ns // 10**9} * HZ"
    return f"msecs_to_jiffies({delay_ns // 10**6})" if delay_ns >= 10**6 else f"usecs_to_jiffies({delay_ns // 1000})"
