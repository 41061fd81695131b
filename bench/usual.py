"""The same API the usual way: a sync SQLModel session for each request, as the popular templates have it.

Written to be fast within that: one index that serves the list, pooled connections, no echo, no pre-ping.
"""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

import jwt
from fastapi import Depends, FastAPI, HTTPException, Query, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import computed_field
from sqlmodel import DateTime, Field, Index, Session, SQLModel, col, create_engine, select

# More connections, up to one for each of Starlette's 40 threads, made it no faster.
engine = create_engine(
    os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://"), pool_size=10, max_overflow=0
)


def now() -> datetime:
    return datetime.now(UTC)


class TaskCreate(SQLModel):
    title: str = Field(min_length=1, max_length=500)
    description: str | None = Field(default=None, max_length=5000)
    completed: bool = False


class TaskUpdate(SQLModel):
    title: str | None = Field(default=None, min_length=1, max_length=500)
    description: str | None = Field(default=None, max_length=5000)
    completed: bool | None = None


class Task(TaskCreate, table=True):
    __tablename__ = "tasks"
    __table_args__ = (Index("tasks_user_id_created_at", "user_id", "created_at"),)

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    user_id: str
    created_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))
    updated_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))


class TaskPublic(TaskCreate):
    id: UUID
    user_id: str
    created_at: datetime
    updated_at: datetime

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_completed(self) -> bool:
        return self.completed


def get_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def current_user(credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    try:
        return str(jwt.decode(credentials.credentials, os.environ["JWT_SECRET"], ["HS256"])["sub"])
    except (jwt.PyJWTError, KeyError):
        raise HTTPException(401, "Could not validate credentials") from None


DbSession = Annotated[Session, Depends(get_session)]
CurrentUser = Annotated[str, Depends(current_user)]


def own_task(session: Session, task_id: UUID, user_id: str) -> Task:
    task = session.get(Task, task_id)
    if task is None or task.user_id != user_id:
        raise HTTPException(404, "Task not found")
    return task


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    SQLModel.metadata.create_all(engine)
    yield
    engine.dispose()


app = FastAPI(lifespan=lifespan)


def store(session: Session, task: Task) -> Task:
    session.add(task)
    session.commit()
    session.refresh(task)
    return task


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/tasks", response_model=list[TaskPublic])
def list_tasks(session: DbSession, user_id: CurrentUser, limit: Annotated[int, Query(ge=1, le=1000)] = 1000) -> Any:
    newest_first = col(Task.created_at).desc()
    return session.exec(select(Task).where(Task.user_id == user_id).order_by(newest_first).limit(limit)).all()


@app.post("/tasks", response_model=TaskPublic, status_code=201)
def create_task(session: DbSession, user_id: CurrentUser, body: TaskCreate) -> Any:
    return store(session, Task.model_validate(body, update={"user_id": user_id}))


@app.get("/tasks/{task_id}", response_model=TaskPublic)
def get_task(session: DbSession, user_id: CurrentUser, task_id: UUID) -> Any:
    return own_task(session, task_id, user_id)


@app.put("/tasks/{task_id}", response_model=TaskPublic)
@app.patch("/tasks/{task_id}", response_model=TaskPublic)
def update_task(session: DbSession, user_id: CurrentUser, task_id: UUID, body: TaskUpdate) -> Any:
    task = own_task(session, task_id, user_id)
    return store(session, task.sqlmodel_update(body.model_dump(exclude_unset=True), update={"updated_at": now()}))


@app.patch("/tasks/{task_id}/toggle", response_model=TaskPublic)
def toggle_task(session: DbSession, user_id: CurrentUser, task_id: UUID) -> Any:
    task = own_task(session, task_id, user_id)
    return store(session, task.sqlmodel_update({"completed": not task.completed, "updated_at": now()}))


@app.delete("/tasks/{task_id}", status_code=204)
def delete_task(session: DbSession, user_id: CurrentUser, task_id: UUID) -> Response:
    session.delete(own_task(session, task_id, user_id))
    session.commit()
    return Response(status_code=204)
