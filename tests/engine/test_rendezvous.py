"""Where the processes of one run meet, no other machine can come."""

import os

import psutil
from torch.distributed.elastic.rendezvous import RendezvousParameters

from kdzoo.engine.ranks import OnThisMachine


def listening():
    """The addresses at which this process takes connections, by port."""
    found = [one for one in psutil.net_connections(kind="inet") if one.pid == os.getpid()]
    return {one.laddr.port: one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}


def test_the_processes_of_a_run_meet_where_no_other_machine_can_reach_them():
    before = listening()
    place = OnThisMachine(RendezvousParameters(OnThisMachine.NAME, "", "a run", 1, 1))
    opened = {port: address for port, address in listening().items() if port not in before}
    assert opened == {place.place.master_port: "127.0.0.1"}
    met = place.next_rendezvous()
    met.store.set("said", "heard")
    assert met.store.get("said") == b"heard"
    assert (met.rank, met.world_size, met.bootstrap_store_info.master_addr) == (0, 1, "127.0.0.1")
