"""A real detector simulation to be merged: 60,000 volumes, about 120 MB of heap.

Run by the interpreter of an environment with `geant4-pybind`, several copies at
once; `bench/geant4_share.py` does that.  The particles are geantinos, which need no
data sets: they cross the detector in a straight line, so every event must cross the
same number of volumes.  That number is compared after each event: a wrong byte in the
geometry shows as a wrong count or a crash.  As in production the copy works on one
long run: between two runs Geant4 builds its search structures anew.

FOLDER is how the copies and their starter talk: `ready.PID` appears when the
detector is built and its run has begun, the copy goes on simulating until there
is a file `finish`, then writes `done.PID` with its events and the volumes per event.
"""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

VOLUMES = 60_000
EVENTS = 2**31 - 1
LOOK_EVENTS = 50

folder = Path(sys.argv[1])
(folder / "ENSDFSTATE.dat").touch()
os.environ["G4ENSDFSTATEDATA"] = str(folder)
# The package asks whether to download data sets; geantinos need none.
sys.stdin = io.StringIO("n\nn\n")
import geant4_pybind as g4  # noqa: E402


class Detector(g4.G4VUserDetectorConstruction):  # type: ignore[misc]
    """A box of silicon cells in air, each with its own solid and logical volume."""

    def Construct(self) -> g4.G4VPhysicalVolume:
        materials = g4.G4NistManager.Instance()
        air, silicon = (materials.FindOrBuildMaterial(name) for name in ("G4_AIR", "G4_Si"))
        world = g4.G4LogicalVolume(g4.G4Box("world", 1 * g4.m, 1 * g4.m, 1 * g4.m), air, "world")
        placed = g4.G4PVPlacement(None, g4.G4ThreeVector(), world, "world", None, False, 0)
        self.cells = [self._cell(number, silicon, world) for number in range(VOLUMES)]
        return placed

    @staticmethod
    def _cell(number: int, material: g4.G4Material, world: g4.G4LogicalVolume) -> g4.G4PVPlacement:
        name = f"cell{number}"
        solid = g4.G4Box(name, 1 * g4.mm, 1 * g4.mm, 1 * g4.mm)
        logical = g4.G4LogicalVolume(solid, material, name)
        x, y, z = number % 30 - 15, number // 30 % 30 - 15, number // 900 - 11
        at = g4.G4ThreeVector(x * 5 * g4.mm, y * 5 * g4.mm, z * 5 * g4.mm)
        return g4.G4PVPlacement(None, at, logical, name, world, False, number)


class Beam(g4.G4VUserPrimaryGeneratorAction):  # type: ignore[misc]
    """One geantino an event, always along the same line."""

    def __init__(self) -> None:
        super().__init__()
        self.gun = g4.G4ParticleGun(1)
        self.gun.SetParticleDefinition(g4.G4Geantino.Definition())
        self.gun.SetParticleEnergy(1 * g4.GeV)

    def GeneratePrimaries(self, event: g4.G4Event) -> None:
        self.gun.SetParticlePosition(g4.G4ThreeVector(0, 0, -90 * g4.cm))
        self.gun.SetParticleMomentumDirection(g4.G4ThreeVector(0.01, 0.02, 1))
        self.gun.GeneratePrimaryVertex(event)


class Steps(g4.G4UserSteppingAction):  # type: ignore[misc]
    """Counts the volumes that were crossed."""

    count = 0

    def UserSteppingAction(self, _step: g4.G4Step) -> None:
        Steps.count += 1


class Events(g4.G4UserEventAction):  # type: ignore[misc]
    """Compares every event with the first, and ends the run when it is time."""

    done = 0
    crossed = 0

    def BeginOfEventAction(self, _event: g4.G4Event) -> None:
        Steps.count = 0

    def EndOfEventAction(self, _event: g4.G4Event) -> None:
        Events.done += 1
        if Events.done == 1:
            Events.crossed = Steps.count
        elif Steps.count != Events.crossed:
            os.write(2, f"event {Events.done}: {Steps.count} volumes, must be {Events.crossed}\n".encode())
            os._exit(1)
        if Events.done == LOOK_EVENTS:
            (folder / f"ready.{os.getpid()}").write_text(f"{Events.crossed}\n")
        if Events.done % LOOK_EVENTS == 0:
            time.sleep(0.01)
            if (folder / "finish").exists():
                g4.G4RunManager.GetRunManager().AbortRun(True)


class Actions(g4.G4VUserActionInitialization):  # type: ignore[misc]
    def Build(self) -> None:
        for action in (Beam(), Steps(), Events()):
            self.SetUserAction(action)


class Physics(g4.G4VModularPhysicsList):  # type: ignore[misc]
    """Transportation alone."""

    def ConstructParticle(self) -> None:
        g4.G4Geantino.Definition()

    def ConstructProcess(self) -> None:
        g4.G4VModularPhysicsList.ConstructProcess(self)

    def SetCuts(self) -> None:
        """Geantinos have no production cuts."""


def main() -> None:
    manager = g4.G4RunManagerFactory.CreateRunManager(g4.G4RunManagerType.Serial)
    for part in (Detector(), Physics(), Actions()):
        manager.SetUserInitialization(part)
    manager.Initialize()
    manager.BeamOn(EVENTS)
    (folder / f"done.{os.getpid()}").write_text(f"{Events.done} {Events.crossed}\n")


main()
