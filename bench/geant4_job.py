"""A real detector simulation to be merged: 60,000 volumes, about 120 MB of heap.

Run by the interpreter of an environment with `geant4-pybind`, several copies at
once; `bench/geant4_share.py` does that.  The particles are geantinos, which need no
data sets: they cross the detector in a straight line, so every run of the same
number of events must cross the same number of volumes.  That number is compared
after each run: a wrong byte in the geometry shows as a wrong count or a crash.

FOLDER is how the copies and their starter talk: `ready.PID` appears when the
detector is built and a first run is done, the copy goes on simulating until there
is a file `finish`, then writes `done.PID` with its runs and the volumes per run.
"""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

VOLUMES = 60_000
EVENTS = 50

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


class Actions(g4.G4VUserActionInitialization):  # type: ignore[misc]
    def Build(self) -> None:
        self.SetUserAction(Beam())
        self.SetUserAction(Steps())


class Physics(g4.G4VModularPhysicsList):  # type: ignore[misc]
    """Transportation alone."""

    def ConstructParticle(self) -> None:
        g4.G4Geantino.Definition()

    def ConstructProcess(self) -> None:
        g4.G4VModularPhysicsList.ConstructProcess(self)

    def SetCuts(self) -> None:
        """Geantinos have no production cuts."""


def one_run(manager: g4.G4RunManager) -> int:
    """Volumes crossed by EVENTS events."""
    Steps.count = 0
    manager.BeamOn(EVENTS)
    return Steps.count


def main() -> None:
    manager = g4.G4RunManagerFactory.CreateRunManager(g4.G4RunManagerType.Serial)
    for part in (Detector(), Physics(), Actions()):
        manager.SetUserInitialization(part)
    manager.Initialize()
    crossed = one_run(manager)
    (folder / f"ready.{os.getpid()}").write_text(f"{crossed}\n")
    runs = 1
    while not (folder / "finish").exists():
        again = one_run(manager)
        if again != crossed:
            sys.exit(f"run {runs}: {again} volumes crossed, must be {crossed}")
        runs += 1
        time.sleep(0.01)
    (folder / f"done.{os.getpid()}").write_text(f"{runs} {crossed}\n")


main()
